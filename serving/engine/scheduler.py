"""What runs next: admission, prefill in bounded chunks, and the choice of a stage."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.paging import PAGE, pages_for
from models.paths import NOWHERE, Path
from serving.engine.choice import StageChooser
from serving.engine.core import Chunk, Floats, Ints, Request, Sequence, Tick
from serving.engine.depth import AT_LEAST, DEFAULT_THRESHOLDS, SIGNALS, ExitReason
from serving.engine.governor import Governor
from serving.engine.news import Load
from serving.engine.params import MAX_PRIORITY
from serving.engine.paths import PathTable
from serving.engine.random import derive
from serving.engine.rows import FULL_DEPTH, IDLE, MANY, Rows
from serving.engine.slots import SlotPool, TokenBudget
from serving.engine.waiting import WaitingQueue
from serving.errors import InvalidArgumentError, OverloadedError

COUNTING = SIGNALS.index("argmax")
GOVERNED = int(ExitReason.GOVERNED)
UNREPEATABLE = np.isin(np.arange(max(ExitReason) + 1), [GOVERNED, int(ExitReason.OUT_OF_TIME)])
"""By reason: whether another time the same policy may let the token go deeper."""

Skipped = tuple[int, Ints, Ints]
"""A stage, slots, and the depth of each: passes that rows do without."""


class _Parked(NamedTuple):
    """Everything that could run, first the decoding rows, then the chunks."""

    slots: Ints  # of the rows
    nodes: Ints
    places: Ints
    stages: Ints
    tokens: Ints
    since: Ints  # the tick at which each was parked


class Scheduler:
    """Owns the waiting queue, the slots and the rows. A running sequence is never evicted."""

    def __init__(
        self,
        first_stage: int | None,
        final_stages: frozenset[int],
        slots: int,
        *,
        max_tokens: int,
        budget: TokenBudget,
        prefill_tokens: int,
        max_waiting: int,
        queue_target_s: float | None = None,
        clock: Callable[[], float],
        shed_wait_s: float | None = None,
        min_depth: int | None = None,
        fills: bool = False,
        one_by_one: frozenset[str] = frozenset(),
    ):
        """`prefill_tokens` bounds the prompt tokens on their way, and so how long a tick keeps decoding rows
        waiting. `max_tokens` bounds each sequence, `budget` the growing state of all of them. Tokens begin at the
        `first_stage` (None: and come back to it); the `final_stages` end with the head."""
        self.slots = SlotPool(slots)
        self.budget = budget
        self.rows = Rows(slots)
        self.paths = PathTable()
        self.running: dict[int, Sequence] = {}  # by their first slot
        self.requests: dict[str, Request] = {}  # waiting or running
        self.tick = 0
        self._final = final_stages
        self._max_tokens = max_tokens
        self._prefill_tokens = prefill_tokens
        self._clock = clock
        self._min_depth = min_depth
        self.governor = Governor(shed_wait_s, clock)
        self._fills = fills
        self._one_by_one = one_by_one
        self._waiting = WaitingQueue(max_waiting, queue_target_s, clock, needed=2 * slots)
        self._prefilling: list[Sequence] = []
        self._chunks: list[Chunk] = []
        self._deadlines: list[tuple[float, str]] = []
        self.chooser = StageChooser(first_stage, final_stages)

    def submit(self, request: Request, path: Path) -> Request | None:
        """Queue a request, whose tokens will take this path; returns one that had to make room for it. Raises
        InvalidArgumentError or OverloadedError."""
        if request.id in self.requests:
            raise InvalidArgumentError("request_id", request.id, "is already running")
        needed = request.params.n * path.slots
        if path.slots > self.slots.capacity:
            limit = f"a layer that comes {path.slots} times takes as many slots, this model has "
            limit += str(self.slots.capacity)
            raise InvalidArgumentError("depth.chain", request.policy.layers, limit)
        if needed > self.slots.capacity:
            limit = f"the request needs {needed} slots, this model has {self.slots.capacity}"
            raise InvalidArgumentError("n", request.params.n, limit)
        tokens = request.params.n * self.reserved(request, path)
        if self.budget.capacity is not None and tokens > self.budget.capacity:
            given = f"{len(request.prompt)} tokens and max_tokens = {request.params.max_tokens}"
            limit = f"need room for {tokens} tokens, this model has it for {self.budget.capacity}"
            raise InvalidArgumentError("prompt", given, limit)
        displaced = None
        full = self._waiting.full and (self._waiting or self.slots.available < needed)
        if full and request.priority <= MAX_PRIORITY:  # above are those that had their place elsewhere
            self._waiting.refused()
            displaced = self._waiting.make_room(request)
            if displaced is None:
                raise OverloadedError(f"the queue is full: {len(self._waiting)} requests are waiting")
            del self.requests[displaced.id]
        request.arrival = self._clock()
        self.requests[request.id] = request
        self._waiting.push(request, path)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))
        return displaced

    def reserved(self, request: Request, path: Path) -> int:
        """Entries of growing state that one continuation may come to hold, to whole pages."""
        longest = (
            len(request.prompt) if request.reads_only else len(request.prompt) + request.params.max_tokens
        )
        return path.slots * PAGE * pages_for(min(longest, self._max_tokens))

    def load(self) -> Load:
        waiting = self._waiting
        return Load(self.slots.capacity, self.slots.used, len(waiting), waiting.most, *waiting.crowd())

    def refused(self) -> None:
        """A request was turned away before it came here."""
        self._waiting.refused()

    def give_up(self) -> list[Request]:
        """Requests that are not going to have their turn; they are out of the queue."""
        given_up = self._waiting.give_up()
        for request in given_up:
            del self.requests[request.id]
        return given_up

    def expired(self) -> Iterator[Request]:
        """Requests whose deadline has passed."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.deadline is not None and request.deadline <= now:
                yield request

    def admit(self) -> Iterator[Sequence]:
        """Give slots to waiting requests, as far as there are any."""
        while self._waiting:
            request, path = self._waiting.first()
            tokens = self.reserved(request, path)
            if self.slots.available < request.params.n * path.slots or not self.budget.fits(
                request.params.n * tokens
            ):
                return
            self._waiting.take()
            request.admitted = self._clock()
            for index in range(request.params.n):
                slots = np.array([self.slots.allocate() for _ in range(path.slots)])
                self.budget.allocate(tokens)
                first = int(slots[0])
                sequence = Sequence(
                    request, index, first, derive(request.seed, index), slots, self.paths.add(path)
                )
                request.sequences.append(sequence)
                self.running[first] = sequence
                self.rows.seed[first] = sequence.seed
                if len(slots) > 1:
                    self.rows.further[first] = slots
                self._set_policy(sequence)
                yield sequence
            self._prefilling.append(request.sequences[0])

    def schedule(self) -> Tick | None:
        """Choose a stage, and everything that is parked there."""
        self._cut_chunks()
        self.governor.observe(self._waiting.oldest())
        parked = self._parked()
        if not len(parked.stages):
            return None
        self.tick += 1
        stage = self.chooser.choose(parked.stages, parked.tokens, parked.since, self.tick)
        rows = parked.stages[: len(parked.slots)] == stage
        here, nodes = parked.slots[rows], parked.nodes[rows]
        chunks = [chunk for chunk in self._chunks if self._stage_of(chunk) == stage]
        waited = self.tick - 1 - self.rows.since[here]
        tick = Tick(stage, here, nodes, parked.places[rows], chunks, stage in self._final, waited)
        tick.refills = int((nodes == 0).sum()) if parked.nodes.any() else 0
        if not tick.final:
            self._want(tick)
        return tick

    def ran(self, tick: Tick, seconds: float) -> None:
        """Learn what a stage costs."""
        self.chooser.ran(tick.stage, len(tick.slots) + tick.prefill_tokens, seconds)

    def decide(self, tick: Tick, signals: dict[str, Floats]) -> list[Skipped]:
        """Apply the depth policies: each token of the tick goes on, or leaves for where its path ends early. Returns
        what decoding rows skip by that and have to write, where tokens do."""
        owners, nodes, places = self._tokens(tick)
        units = np.maximum(self._before(tick), self.paths.units[places])
        self._reached(tick, units)
        tick.units = units
        if tick.final:
            return []
        exit_to = self.paths.exit_to[places]
        leave, reasons = self._leaving(tick, owners, units, signals)
        for slot in owners[leave & UNREPEATABLE[reasons]].tolist():
            self.running[slot].tainted = True
        leave &= exit_to != NOWHERE
        reasons = np.where(leave, reasons, FULL_DEPTH)
        count = len(tick.slots)
        self.rows.reason[tick.slots] = reasons[:count]
        self.rows.park(tick.slots, np.where(leave, exit_to, nodes + 1)[:count], self.tick)
        for chunk in tick.chunks:
            part = slice(count, count + len(chunk.active))
            count = part.stop
            chunk.reasons[chunk.active] = reasons[part]
            self._move(chunk, leave[part], exit_to[part])
        return self._skipped(tick, leave[: len(tick.slots)]) if self._fills else []

    def _move(self, chunk: Chunk, leave: npt.NDArray[np.bool_], exit_to: Ints) -> None:
        """Send a chunk on, without its active tokens that leave."""
        chunk.since = self.tick
        if leave.any():
            chunk.meet = int(exit_to[leave][0])
            chunk.active = chunk.active[~leave]
        leads_to = self.paths.leads_to[self.paths.place(chunk.sequence.path, chunk.node + 1)]
        deeper = leads_to <= self.rows.reach[chunk.sequence.slot]
        chunk.fills = self._fills and bool(deeper)
        chunk.node = chunk.node + 1 if len(chunk.active) or chunk.fills else chunk.meet
        if chunk.node == chunk.meet:
            chunk.active, chunk.meet, chunk.fills = np.arange(len(chunk.ids)), NOWHERE, False

    def _skipped(self, tick: Tick, leave: npt.NDArray[np.bool_]) -> list[Skipped]:
        """The passes that leaving rows do without, as far down as later tokens of their sequences may come."""
        leave = leave & (self.rows.reach[tick.slots] > self.rows.units[tick.slots])
        if not leave.any():
            return []
        slots, nodes, places = tick.slots[leave], tick.nodes[leave], tick.places[leave]
        reach, exit_to = self.rows.reach[slots], self.paths.exit_to[places]
        skipped: dict[int, list[tuple[Ints, Ints]]] = {}
        for further in range(1, int((exit_to - nodes).max())):
            there = nodes + further < exit_to
            at = places[there] + further
            seen = self.paths.leads_to[at] <= reach[there]
            stages, depths = self.paths.stage[at], self.paths.depth[at]
            for stage in np.unique(stages[seen]).tolist():
                chosen = seen & (stages == stage)
                skipped.setdefault(stage, []).append((slots[there][chosen], depths[chosen]))
        return [
            (
                stage,
                np.concatenate([slots for slots, _ in parts]),
                np.concatenate([depths for _, depths in parts]),
            )
            for stage, parts in skipped.items()
        ]

    def _before(self, tick: Tick) -> Ints:
        """How deep each token of the tick was before it."""
        rows = self.rows.units[tick.slots]
        if not tick.chunks:
            return rows
        return np.concatenate([rows, *(chunk.units[chunk.active] for chunk in tick.chunks)])

    def _reached(self, tick: Tick, units: Ints) -> None:
        """Write down how deep each token of the tick is now."""
        count = len(tick.slots)
        self.rows.units[tick.slots] = units[:count]
        for chunk in tick.chunks:
            chunk.units[chunk.active] = units[count : count + len(chunk.active)]
            count += len(chunk.active)

    def through(self, chunk: Chunk) -> None:
        """A chunk has passed the final stage."""
        self._chunks.remove(chunk)
        chunk.sequence.prefilled += len(chunk.ids)
        if chunk.last:
            self._prefilling.remove(chunk.sequence)

    def feed(self, sequences: Iterable[Sequence]) -> None:
        """Send the newest token of each on its way."""
        fed = np.array([(s.slot, s.tokens[-1], s.length - 1) for s in sequences], np.int64).reshape(-1, 3)
        slots, tokens, positions = fed.T
        self.rows.feed(slots, tokens, positions, self.tick)

    def pace(self, sequence: Sequence, seconds: float) -> None:
        """A sequence that is to be as deep as its deadline allows had its last token after so many seconds: set how
        deep its next one may go."""
        rows, slot, request = self.rows, sequence.slot, sequence.request
        spent = seconds / max(1, int(rows.units[slot]))
        rows.pace[slot] = spent if np.isnan(rows.pace[slot]) else 0.8 * rows.pace[slot] + 0.2 * spent
        if request.deadline is None:
            return
        tokens = request.params.max_tokens - len(sequence.tokens)
        affordable = (request.deadline - self._clock()) / max(1, tokens) / max(rows.pace[slot], 1e-9)
        path, highest = self.paths[sequence.path], min(int(rows.reach[slot]), int(rows.full[slot]))
        rows.ceiling[slot] = path.deepest(min(affordable, highest), request.policy.min_depth or 1)
        short = rows.ceiling[slot] < highest
        rows.capped[slot] = ExitReason.OUT_OF_TIME if short else ExitReason.FIXED_DEPTH

    def pass_on(self, sequence: Sequence) -> None:
        """If the sequence is prefilling on behalf of siblings, let one of them take its slots and go on."""
        heirs = [s for s in sequence.request.sequences if s is not sequence and s.finished is None]
        if sequence not in self._prefilling or not heirs:
            return
        heir = heirs[0]
        heir.slot, sequence.slot = sequence.slot, heir.slot
        heir.slots, sequence.slots = sequence.slots, heir.slots
        heir.prefilled = sequence.prefilled
        self.running[heir.slot], self.running[sequence.slot] = heir, sequence
        self._prefilling[self._prefilling.index(sequence)] = heir
        for chunk in self._chunks:
            if chunk.sequence is sequence:
                chunk.sequence = heir

    def finish(self, sequence: Sequence) -> bool:
        """Free the slots of a sequence; whether it was the last of its request."""
        request = sequence.request
        self.rows.drop(sequence.slot)
        for slot in sequence.slots.tolist():
            self.slots.free(slot)
        self.budget.free(self.reserved(request, self.paths[sequence.path]))
        self.paths.release(sequence.path)
        del self.running[sequence.slot]
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
            self._chunks = [chunk for chunk in self._chunks if chunk.sequence is not sequence]
        if any(s.finished is None for s in request.sequences):
            return False
        del self.requests[request.id]
        return True

    def before_decoding(self, request: Request) -> bool:
        """Whether a request waits, or has prompt tokens that have not been started on."""
        return not request.sequences or any(s in self._prefilling for s in request.sequences)

    def withdraw(self, request: Request) -> None:
        """Take a request out of the queue."""
        self._waiting.withdraw(request)
        del self.requests[request.id]

    def _set_policy(self, sequence: Sequence) -> None:
        """Write the sequence's depth policy into its columns."""
        rows, slot = self.rows, sequence.slot
        policy, path = sequence.request.policy, self.paths[sequence.path]
        low, high = policy.min_depth or 0, policy.max_depth
        rows.path[slot] = sequence.path
        rows.signal[slot] = SIGNALS.index(policy.signal) if policy.signal else IDLE
        if policy.signal:
            given = policy.threshold
            rows.threshold[slot] = DEFAULT_THRESHOLDS.get(policy.signal, 1.0) if given is None else given
        rows.floor[slot] = policy.min_depth or 0
        ceiling = policy.depth or (MANY if high is None else path.deepest(high, low))
        rows.ceiling[slot] = rows.reach[slot] = ceiling
        rows.full[slot] = path.full_depth
        rows.shed[slot] = next(
            (d for d in (policy.min_depth, self._min_depth) if d is not None), path.full_depth
        )
        rows.early[slot], rows.capped[slot] = policy.reason, ExitReason.FIXED_DEPTH

    def _cut_chunks(self) -> None:
        """Send the next prompt tokens on their way, first come first served, as many as there may be at a time."""
        left = self._prefill_tokens - sum(len(chunk.ids) for chunk in self._chunks)
        busy = {id(chunk.sequence) for chunk in self._chunks}
        for sequence in self._prefilling:
            if left <= 0:
                return
            if id(sequence) in busy:
                continue
            start = sequence.prefilled
            most = 1 if sequence.request.policy.signal in self._one_by_one else left
            most = min([most, *(mark - start for mark in sequence.marks if mark > start)])
            ids = np.array(sequence.request.given[start : start + most], np.int64)
            everything = np.arange(len(ids))
            reasons = np.full(len(ids), ExitReason.FULL_DEPTH, np.int64)
            self._chunks.append(
                Chunk(
                    sequence,
                    ids,
                    start,
                    everything,
                    np.zeros_like(ids),
                    reasons,
                    np.zeros_like(ids),
                    since=self.tick,
                )
            )
            left -= len(ids)

    def _stage_of(self, chunk: Chunk) -> int:
        return self.paths[chunk.sequence.path].nodes[chunk.node].stage

    def _parked(self) -> "_Parked":
        slots = np.flatnonzero(self.rows.node != IDLE)
        nodes, since = self.rows.node[slots], self.rows.since[slots]
        places = self.paths.places(self.rows.path[slots], nodes)
        stages = self.paths.stage[places]
        tokens = np.ones_like(slots)
        if self._chunks:
            waiting = [(self._stage_of(c), len(c.passing), c.since) for c in self._chunks]
            stages, tokens, since = np.hstack([[stages, tokens, since], np.array(waiting).T])
        return _Parked(slots, nodes, places, stages, tokens, since)

    def _tokens(self, tick: Tick) -> tuple[Ints, Ints, Ints]:
        """For each token of a tick: the slot whose policy holds, its node, and the place of that."""
        if not tick.chunks:
            return tick.slots, tick.nodes, tick.places
        lengths = [len(chunk.active) for chunk in tick.chunks]
        owners = np.concatenate([tick.slots, np.repeat([c.sequence.slot for c in tick.chunks], lengths)])
        nodes = np.concatenate([tick.nodes, np.repeat([c.node for c in tick.chunks], lengths)])
        return owners, nodes, self.paths.places(self.rows.path[owners], nodes)

    def _want(self, tick: Tick) -> None:
        """Note the signals that decide about the tokens of a tick. Where a token goes the same way whatever a signal
        says, before its floor and after the last pass, none is computed, unless it counts passes."""
        owners, nodes, places = self._tokens(tick)
        signal = self.rows.signal[owners]
        if (signal == IDLE).all():
            return
        above = self.paths.units[places] < self.rows.floor[owners]
        signal[above & (signal != COUNTING)] = IDLE
        exit_to = self.paths.exit_to[places]
        signal[(exit_to == NOWHERE) | (exit_to == nodes + 1)] = IDLE
        for index in sorted(set(signal.tolist()) - {IDLE}):
            tick.wanted[SIGNALS[index]] = np.flatnonzero(signal == index)

    def _leaving(
        self, tick: Tick, owners: Ints, units: Ints, signals: dict[str, Floats]
    ) -> tuple[npt.NDArray[np.bool_], Ints]:
        """Which tokens want to leave, and why."""
        rows = self.rows
        early = np.zeros(len(owners), bool)
        if "argmax" in signals:
            signals = {**signals, "argmax": self._streaks(tick, signals["argmax"])}
        for name, tokens in tick.wanted.items():
            value, threshold = signals[name], rows.threshold[owners[tokens]]
            early[tokens] = value >= threshold if name in AT_LEAST else value <= threshold
        early &= units >= rows.floor[owners]
        capped = units >= rows.ceiling[owners]
        reasons = np.where(early, rows.early[owners], rows.capped[owners])
        if self.governor.shed:
            governed = units >= self.governor.ceilings(rows.full[owners], rows.shed[owners])
            governed &= units < rows.full[owners]
            reasons[governed & ~early & ~capped] = GOVERNED
            capped |= governed
        return early | capped, reasons

    def _streaks(self, tick: Tick, same: Floats) -> Floats:
        """Count on, for the tokens that want it, how often in a row the prediction has stayed the same."""
        wanting = tick.wanted["argmax"]
        streaks = np.concatenate(
            [self.rows.streak[tick.slots], *(chunk.streaks[chunk.active] for chunk in tick.chunks)]
        )
        streaks[wanting] = np.where(same == 1, streaks[wanting] + 1, 0)
        count = len(tick.slots)
        self.rows.streak[tick.slots] = streaks[:count]
        for chunk in tick.chunks:
            chunk.streaks[chunk.active] = streaks[count : count + len(chunk.active)]
            count += len(chunk.active)
        return streaks[wanting].astype(np.float32)
