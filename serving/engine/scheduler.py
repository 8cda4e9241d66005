"""What runs next: admission, prefill in bounded chunks, and the choice of a stage."""

import heapq
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from models.paging import PAGE, pages_for
from models.paths import Path
from serving.engine import columns
from serving.engine.choice import StageChooser
from serving.engine.core import Chunk, Request, Sequence, Tick
from serving.engine.depth import ExitReason
from serving.engine.exits import Exits
from serving.engine.governor import Governor
from serving.engine.news import Load
from serving.engine.params import MAX_PRIORITY
from serving.engine.paths import PathTable
from serving.engine.random import derive
from serving.engine.rows import Rows
from serving.engine.slots import SlotPool, TokenBudget
from serving.engine.waiting import WaitingQueue
from serving.errors import InvalidArgumentError, OverloadedError


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
        self.governor = Governor(shed_wait_s, clock)
        self.exits = Exits(
            self.rows, self.paths, self.running, self.governor, min_depth=min_depth, fills=fills, clock=clock
        )
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
                self.exits.admit(sequence)
                yield sequence
            self._prefilling.append(request.sequences[0])

    def schedule(self) -> Tick | None:
        """Choose a stage, and everything that is parked there."""
        self._cut_chunks()
        self.governor.observe(self._waiting.oldest())
        rows, paths = self.rows, self.paths
        tables = rows.table, paths.table, paths.longest
        counts, begun, since, oldest = columns.census(*tables, paths.stages)
        waiting = counts.copy() if self._chunks else counts
        for chunk in self._chunks:
            stage = self._stage_of(chunk)
            waiting[stage] += len(chunk.passing)
            if chunk.since < since:
                since, oldest = chunk.since, stage
        if oldest < 0:
            return None
        self.tick += 1
        stage = self.chooser.choose(waiting, oldest, since, self.tick)
        here, begin = columns.parked(stage, counts[stage], self.tick, *tables)
        chunks = [chunk for chunk in self._chunks if self._stage_of(chunk) == stage]
        slots, nodes, places, waited = here
        tick = Tick(stage, slots, nodes, places, waited, chunks, stage in self._final, begin)
        tick.refills = begin if begun else 0
        if not tick.final:
            self.exits.want(tick)
        return tick

    def ran(self, tick: Tick, seconds: float) -> None:
        """Learn what a stage costs."""
        self.chooser.ran(tick.stage, len(tick.slots) + tick.prefill_tokens, seconds)

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

    def _cut_chunks(self) -> None:
        """Send the next prompt tokens on their way, first come first served, as many as there may be at a time."""
        if not self._prefilling:
            return
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
