"""``fathom bench depth``: what leaving early saves, and how near continuous depth-wise batching is to saving all of it.

The same requests three ways: every row to the full depth; early exit with lock-step batches, which wait for their
deepest row; continuously. The three take turns in one run, so that they see the same machine.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from kernels.invariance import use_invariance
from models.checkpoint import ZOO
from models.decoder import Decoder
from models.load import load
from models.paths import NOWHERE
from serving.bench.measure import random_model, report
from serving.engine.choice import StageChooser
from serving.engine.core import Floats, Ints, Request, Result, Tick
from serving.engine.depth import DepthPolicy
from serving.engine.engine import Engine
from serving.engine.observer import Observer
from serving.engine.params import SamplingParams
from serving.engine.paths import PathTable
from serving.engine.random import uniform
from serving.engine.rows import Rows
from serving.engine.runner import TorchRunner
from serving.errors import InvalidArgumentError
from serving.threads import use_threads

RANDOM = "random"
LARGER: dict[str, Any] = {
    "model_type": "recursive",
    "base": {
        "model_type": "gla", "vocab_size": 4096, "hidden_size": 384, "num_hidden_layers": 8, "num_heads": 4,
        "intermediate_size": 1152, "hidden_act": "swish", "tie_word_embeddings": True,
    },
    "sharing": "cycle", "num_recursions": 4, "exit_gate": True,
}  # fmt: skip
"""The larger model of random weights, in the shape of Ouro: all of eight layers up to four times."""

SLICE_S = 0.1  # seconds of one way before the next has its turn
LONGEST_S = 2.5  # seconds of one way in all
WARM_UP = 6  # tokens of each sequence before anything is timed
PROMPT = 8  # tokens


@dataclass(frozen=True, slots=True)
class Exits:
    """One distribution of exits."""

    name: str
    policies: tuple[DepthPolicy, ...]  # of the requests, in turn
    stays: float | None = None  # replayed: the chance that a token goes another time round


@dataclass(slots=True)
class Way(Observer):
    """An engine with all its sequences decoding, and what it has done."""

    engine: Engine
    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.0
    tokens: int = 0
    units: int = 0
    ids: dict[str, list[int]] = field(default_factory=dict)
    ticks: dict[int, list[float]] = field(default_factory=dict)  # stage -> seconds of each full batch
    tick: Tick | None = None

    def ticked(self, tick: Tick, seconds: float) -> None:
        self.tick = tick

    def start(self, prompts: list[list[int]], policies: tuple[DepthPolicy, ...]) -> None:
        self.engine.observer = self
        for i, prompt in enumerate(prompts):
            policy = policies[i % len(policies)]
            params = SamplingParams(temperature=0, max_tokens=1 << 19, ignore_eos=True, depth=policy)
            self.engine.submit(Request(str(i), prompt, params, seed=i))
            self.ids[str(i)] = []

    def step(self) -> None:
        begun = self.clock()
        outputs = self.engine.step()
        taken = self.clock() - begun
        self.seconds += taken
        for out in outputs:
            self.ids[out.request_id] += out.ids
            self.tokens += len(out.ids)
            self.units += sum(out.depths)
        if self.tick is not None and len(self.tick.slots) == len(self.ids):
            self.ticks.setdefault(self.tick.stage, []).append(taken)

    def warm_up(self) -> None:
        least = WARM_UP * len(self.ids)
        while self.tokens < least or not all(self.ids.values()):
            self.step()
        self.seconds, self.tokens, self.units = 0.0, 0, 0
        self.ticks.clear()

    def turn(self) -> None:
        until = self.seconds + SLICE_S
        while self.seconds < until:
            self.step()

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class LockStep(StageChooser):
    """In place of the engine's choice of a stage: the earliest one where anything is parked, so that rows which have
    left wait until the deepest one has."""

    def choose(self, waiting: Ints, oldest: int, since: int, tick: int) -> int:
        return int(np.flatnonzero(waiting)[0])


class Replaying(TorchRunner):
    """The gate says what a trace of depths says: [sequences, tokens]."""

    trace: npt.NDArray[np.int64]

    def run(self, tick: Tick, rows: Rows, paths: PathTable) -> Result:
        result = super().run(tick, rows, paths)
        if "gate" in tick.wanted:
            slots, nodes = tick.tokens()
            positions = rows.position[tick.slots]
            if tick.chunks:
                positions = np.concatenate([positions, *(c.start + c.active for c in tick.chunks)])
            at = slots, nodes, positions, rows.path, rows.seed, paths.units, paths.longest
            result.signals["gate"] = _replayed(self.trace, tick.wanted["gate"], *at)
        return result


@numba.njit(cache=True, nogil=True)
def _replayed(
    trace: Ints,  # [sequences, tokens]
    wanted: Ints,  # [W] of the tokens
    slots: Ints,  # [T], as the next
    nodes: Ints,
    positions: Ints,
    path: Ints,  # [slots], as the next
    seed: npt.NDArray[np.uint64],  # the number of the sequence
    units: Ints,  # [places]
    longest: int,
) -> Floats:
    """1 for those of the wanted tokens that have been as deep as the trace says, [W]. Compiled: what stands for a gate
    is to cost no more than one."""
    out = np.empty(wanted.size, np.float32)
    for i in range(wanted.size):
        token = wanted[i]
        slot = slots[token]
        depth = trace[np.int64(seed[slot]), positions[token] % trace.shape[1]]
        out[i] = units[path[slot] * longest + nodes[token]] >= depth
    return out


def trace_of(sequences: int, tokens: int, depths: int, stays: float) -> npt.NDArray[np.int64]:
    """Depths [sequences, tokens] from 1 to `depths`: after each pass a token goes on with the chance `stays`."""
    seeds = np.repeat(np.arange(sequences, dtype=np.uint64), tokens)
    u = uniform(seeds, np.tile(np.arange(tokens), sequences)).reshape(sequences, tokens)
    passes = np.full(u.shape, depths, np.int64)
    for depth in range(depths - 1, 0, -1):
        passes[u >= stays**depth] = depth
    return passes


def exits_of(model: Decoder, replayed: bool) -> list[Exits]:
    """From none to heavy."""
    full = model.path().full_depth
    if replayed:
        chances = [("none", 1.0), ("light", 0.9), ("medium", 0.7), ("heavy", 0.35)]
        return [Exits(name, (DepthPolicy.gate(0.5),), chance) for name, chance in chances]
    if "gate" in model.signals:
        gates = [("light", 0.9), ("medium", 0.6), ("heavy", 0.3)]
        return [
            Exits("none", (DepthPolicy.gate(1.0, min_depth=full),)),
            *(Exits(name, (DepthPolicy.gate(threshold),)) for name, threshold in gates),
        ]
    if "router" in model.signals:
        return [
            Exits("none", (DepthPolicy.router(min_depth=full),)),
            Exits("its own", (DepthPolicy.router(),)),
            *(
                Exits(f"its own, at most {d}", (DepthPolicy.router(max_depth=d),))
                for d in range(full - 1, 0, -1)
            ),
        ]
    fixed = [DepthPolicy.fixed(node.units) for node in model.path().nodes if node.exit_to != NOWHERE]
    shares = [("confident 0.95", 0.95), ("confident 0.5", 0.5)]
    return [
        Exits("none", (DepthPolicy.confidence("probability", 1.0, min_depth=full),)),
        Exits("sub-models by turns", tuple(fixed)),
        Exits("mostly the smallest", (*(fixed[:1] * len(fixed)), *fixed[1:])),
        *(Exits(name, (DepthPolicy.confidence("probability", share),)) for name, share in shares),
    ]


def ideal(model: Decoder, ticks: dict[int, list[float]], mean_depth: float) -> float:
    """(p + D c + q) / (p + d c + q), with the median times of full batches of every stage."""
    cost = {stage: float(np.median(taken)) for stage, taken in ticks.items()}
    nodes = model.path().nodes
    outside = sum(cost[node.stage] for node in nodes if not node.units)
    depths, spent = [0.0], [0.0]
    for node in nodes:
        if node.units:
            depths.append(float(node.units))
            spent.append(spent[-1] + cost[node.stage])
    return (outside + spent[-1]) / (outside + float(np.interp(mean_depth, depths, spent)))


def measure(
    model: Decoder,
    name: str,
    distributions: list[Exits],
    tokens: int,
    prompts: list[list[int]],
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """A row for each distribution of exits: all ways take turns, until each has made `tokens` tokens of each
    sequence on average, or has had LONGEST_S."""
    longest, sequences = 4 * (tokens + WARM_UP) + PROMPT, len(prompts)

    def way(exits: Exits, policies: tuple[DepthPolicy, ...], lock_step: bool = False) -> Way:
        runner = (TorchRunner if exits.stays is None else Replaying)(model, sequences, max_tokens=longest)
        if isinstance(runner, Replaying):
            runner.trace = trace_of(sequences, longest, model.path().full_depth, exits.stays or 0.0)
        engine = Engine(runner, sequences, max_tokens=longest, max_waiting=sequences, clock=clock)
        if lock_step:
            engine.scheduler.chooser = LockStep(runner.first_stage, runner.final_stages)
        made = Way(engine, clock)
        made.start(prompts, policies)
        made.warm_up()
        return made

    everything = way(distributions[0], (DepthPolicy.full(),))
    pairs = [(way(e, e.policies, lock_step=True), way(e, e.policies)) for e in distributions]
    going = [everything, *(w for pair in pairs for w in pair)]
    while going:
        for w in going:
            w.turn()
        going = [w for w in going if w.tokens < tokens * sequences and w.seconds < LONGEST_S]
    return [_row(model, name, e, everything, *pair) for e, pair in zip(distributions, pairs, strict=True)]


def _row(
    model: Decoder, name: str, exits: Exits, everything: Way, lock_step: Way, continuous: Way
) -> dict[str, Any]:
    depth = continuous.units / continuous.tokens
    best = ideal(model, everything.ticks, depth)
    ratio = continuous.rate / everything.rate
    return {
        "model": name,
        "exits": exits.name,
        "sequences": len(continuous.ids),
        "tokens_per_s": round(continuous.rate, 1),
        "mean_depth": round(depth, 3),
        "ratio_vs_full": round(ratio, 3),
        "ratio_vs_lockstep": round(continuous.rate / lock_step.rate, 3),
        "ideal": round(best, 3),
        "share_of_ideal": round(ratio / best, 3),
        "tokens_identical": _agree(lock_step.ids, continuous.ids),
    }


def _agree(a: dict[str, list[int]], b: dict[str, list[int]]) -> bool:
    """Whether two ways gave the same tokens, as far as both came."""
    return all(x == y for key in a for x, y in zip(a[key], b[key], strict=False))


def zoo() -> Iterator[str]:
    """The models that ship and have exits."""
    for folder in sorted(ZOO.glob("*/model.safetensors")):
        name = f"zoo/{folder.parent.name}"
        if any(node.exit_to != NOWHERE for node in load(name).model.path().nodes):
            yield name


def prompts_for(model: Decoder, tokenizer: Any, sequences: int) -> list[list[int]]:
    """Beginnings of functions that no model of the zoo has seen; random tokens for a model without a tokenizer."""
    if tokenizer is None:
        random = np.random.default_rng(0)
        return random.integers(0, model.vocab_size, (sequences, PROMPT)).tolist()
    import heapq
    import inspect
    import statistics
    import textwrap

    text = "".join(inspect.getsource(module) for module in (heapq, statistics, textwrap))
    ids = tokenizer.encode(text).ids
    starts = np.linspace(0, len(ids) - PROMPT, sequences).astype(int).tolist()
    return [ids[start : start + PROMPT] for start in starts]


def run(
    names: list[str],
    sequences: list[int],
    tokens: int,
    dtype: str,
    threads: int | None,
    *,
    batch_invariant: bool = True,
    processor_time: bool = False,
) -> None:
    """With `processor_time` one thread works, and its time on the processor is what counts: on a machine that others
    use as well, the clock says more about them."""
    clock = time.thread_time if processor_time else time.perf_counter
    use_threads(1 if processor_time else threads)
    use_invariance(batch_invariant)
    rows = []
    for name in names or [*zoo(), RANDOM]:
        replayed = name == RANDOM
        loaded = random_model(LARGER, RANDOM, dtype) if replayed else load(name, dtype)
        model = loaded.model
        if all(node.exit_to == NOWHERE for node in model.path().nodes):
            raise InvalidArgumentError("model", name, "every token of this model takes all of its layers")
        exits = exits_of(model, replayed=replayed)
        for count in track(sequences, description=name, transient=True):
            prompts = prompts_for(model, loaded.tokenizer, count)
            rows += measure(model, name, exits, tokens, prompts, clock)
    counted = "of the processor" if processor_time else "by the clock"
    report(
        f"depth-wise batching, {torch.get_num_threads()} threads, times {counted}",
        (key.replace("_", " ") for key in rows[0]),
        (map(str, row.values()) for row in rows),
        {"bench": "depth", "rows": rows},
    )
