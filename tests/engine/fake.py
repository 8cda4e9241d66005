"""A model of integers in place of one of tensors: every state and hidden vector is a hash of all that went into it, so
that a token at the wrong slot, depth, position or time gives another result. With it, a plain reference that runs one
sequence and one token at a time, and a clock that only moves when a stage runs."""

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.paths import NOWHERE, Node, Path
from serving.engine.core import Chunk, Result, Sampled, Sequence, Tick
from serving.engine.depth import DepthPolicy
from serving.engine.engine import Engine
from serving.engine.paths import PathTable
from serving.engine.rows import Rows

VOCAB = 997


def mix(*parts: int) -> int:
    value = 0x9E3779B9
    for part in parts:
        value = (value ^ (part + 0x7F4A7C15)) * 0x5851F42D4C957F2D % 2**61
        value ^= value >> 29
    return value


def plain() -> Path:
    return Path((Node(0, units=1),))


def looped(depths: int) -> Path:
    """Prelude, core x depths, coda; a token may leave after any pass through the core."""
    coda = depths + 1
    core = [Node(1, depth, units=depth + 1, exit_to=coda) for depth in range(depths)]
    return Path((Node(0), *core, Node(2)))


def nested(segments: int) -> Path:
    """Segments, then the head; a token may leave after any of them."""
    parts = [Node(i, units=i + 1, exit_to=segments) for i in range(segments)]
    return Path((*parts, Node(segments)))


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeState:
    states: dict[tuple[int, int], int]
    nbytes: int = 100


@dataclass
class FakeRunner:
    full: Path
    clock: Clock = field(default_factory=Clock)
    cost: Callable[[int, int], float] = lambda stage, tokens: 1.0
    default_depth: DepthPolicy = field(default_factory=DepthPolicy)
    vocab_size: int = VOCAB
    token_capacity: int | None = None
    fills: bool = False
    draws: bool = False
    one_by_one: frozenset[str] = frozenset()
    ticks: list[tuple[int, int]] = field(default_factory=list)  # (stage, tokens)

    def __post_init__(self) -> None:
        self.first_stage = 0
        self.final_stages = frozenset({self.full.nodes[-1].stage})
        self.states: dict[tuple[int, int, int], int] = {}  # (slot, stage, depth)
        self.hidden: dict[int, int] = {}  # by slot
        self.endings: dict[int, Seq[int]] = {}

    def path(self, policy: DepthPolicy) -> Path:
        return self.full

    def flops(self, path: Path, units: float | None = None, reach: float | None = None) -> float:
        return 1.0 + (path.full_depth if units is None else units)

    def admit(self, sequence: Sequence, endings: Seq[int]) -> None:
        assert sequence.slot not in self.endings, "the slot is in service already"
        self.endings[sequence.slot] = endings
        for key in [key for key in self.states if key[0] == sequence.slot]:
            del self.states[key]

    def fork(self, source: Sequence, target: Sequence) -> None:
        for (slot, stage, depth), value in list(self.states.items()):
            if slot == source.slot:
                self.states[target.slot, stage, depth] = value

    def save(self, sequence: Sequence, above: Any) -> "FakeState":
        return FakeState({key[1:]: value for key, value in self.states.items() if key[0] == sequence.slot})

    def load(self, sequence: Sequence, chain: Any) -> None:
        for (stage, depth), value in chain[-1].states.items():
            self.states[sequence.slot, stage, depth] = value

    def export(self, sequence: Sequence, about: dict[str, Any]) -> Callable[[], bytes]:
        saved = [[*key, value] for key, value in self.save(sequence, None).states.items()]
        return lambda: json.dumps([saved, about]).encode()

    def parse(self, snapshot: bytes) -> "tuple[FakeState, dict[str, Any]]":
        saved, about = json.loads(snapshot)
        return FakeState({(stage, depth): value for stage, depth, value in saved}), about

    def release(self, sequence: Sequence) -> None:
        del self.endings[sequence.slot]

    def run(self, tick: Tick, rows: Rows, paths: PathTable) -> Result:
        self.ticks.append((tick.stage, len(tick.slots) + tick.prefill_tokens))
        self.clock.now += self.cost(*self.ticks[-1])
        hidden = []
        for slot, node in zip(tick.slots.tolist(), tick.nodes.tolist(), strict=True):
            start = int(rows.token[slot]) if node == 0 else self.hidden[slot]
            self.hidden[slot] = self._pass(slot, self.full.nodes[node], start, int(rows.position[slot]))
            hidden.append(self.hidden[slot])
        for chunk in tick.chunks:
            hidden += self._chunk(chunk)
        if tick.final:
            return Result(sampled=self._sample(tick, hidden))
        return Result(
            {name: np.array([signal(hidden[t]) for t in tokens]) for name, tokens in tick.wanted.items()}
        )

    def _chunk(self, chunk: Chunk) -> list[int]:
        if chunk.rows is None:
            chunk.rows = chunk.ids.tolist()
        for i in chunk.active.tolist():
            node = self.full.nodes[chunk.node]
            chunk.rows[i] = self._pass(chunk.sequence.slot, node, chunk.rows[i], chunk.start + i)
        return [chunk.rows[i] for i in chunk.active.tolist()]

    def _pass(self, slot: int, node: Node, hidden: int, position: int) -> int:
        key = slot, node.stage, node.depth
        self.states[key] = mix(self.states.get(key, 0), hidden, position)
        return mix(hidden, self.states[key])

    def _sample(self, tick: Tick, hidden: list[int]) -> Sampled:
        slots, ids = tick.slots.tolist(), [token(h) for h in hidden[: len(tick.slots)]]
        scores = {}
        at = len(slots)
        for chunk in tick.chunks:
            request = chunk.sequence.request
            here, at = hidden[at : at + len(chunk.ids)], at + len(chunk.ids)
            if request.score:
                count = len(here) - chunk.last
                scores[chunk.sequence.slot] = np.array([h % 1000 / 1000 for h in here[:count]], np.float32)
            elif chunk.last:
                for sequence in request.sequences:
                    if sequence.finished is None:
                        slots.append(sequence.slot)
                        ids.append(token(here[-1]))
        return Sampled(np.array(slots, np.int64), np.array(ids, np.int64), scores=scores)


def signal(hidden: int) -> float:
    return hidden % 1000 / 1000


def token(hidden: int) -> int:
    return mix(hidden) % VOCAB


def reference(
    path: Path,
    prompt: list[int],
    count: int,
    leaves: Callable[[int, int], bool] = lambda units, hidden: False,
) -> tuple[list[int], list[int]]:
    """`count` tokens after a prompt, and the depth of each: one token at a time, the whole path by hand.
    `leaves(units, hidden)`: whether a token leaves early."""
    states: dict[tuple[int, int], int] = {}
    ids, depths = list(prompt), []
    for position in range(len(prompt) + count - 1):
        hidden, node, units = ids[position], 0, 0
        while True:
            here = path.nodes[node]
            key = here.stage, here.depth
            states[key] = mix(states.get(key, 0), hidden, position)
            hidden = mix(hidden, states[key])
            units = max(units, here.units)
            if node == len(path.nodes) - 1:
                break
            node = here.exit_to if here.exit_to != NOWHERE and leaves(units, hidden) else node + 1
        if position >= len(prompt) - 1:
            ids.append(token(hidden))
            depths.append(units)
    return ids[len(prompt) :], depths


def make_engine(runner: FakeRunner, slots: int = 4, **options: object) -> Engine:
    return Engine(runner, slots, clock=runner.clock, **options)  # type: ignore[arg-type]


def assert_no_leak(engine: Engine) -> None:
    """After all work is done nothing is held."""
    scheduler = engine.scheduler
    assert not engine.busy
    assert scheduler.slots.used == 0
    assert scheduler.slots.available == scheduler.slots.capacity
    assert scheduler.budget.used == 0
    assert not scheduler.running and not scheduler.rows.node[scheduler.rows.node != -1].size
    assert not scheduler._prefilling and not scheduler._chunks and not scheduler._waiting
    assert not any(scheduler.paths._users)
    if isinstance(engine.runner, FakeRunner):
        assert not engine.runner.endings
