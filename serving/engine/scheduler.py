"""What runs next: admission, prefill in bounded chunks, decoding rows, deadlines."""

import heapq
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from serving.engine.core import Chunk, Load, Request, Sequence, Tick
from serving.engine.paths import Path
from serving.engine.random import derive
from serving.engine.rows import IDLE, Rows
from serving.engine.slots import SlotPool
from serving.errors import InvalidArgumentError, OverloadedError


class Scheduler:
    """Owns the waiting queue, the slots and the rows. A running sequence is never evicted."""

    def __init__(
        self,
        path: Path,
        slots: int,
        *,
        prefill_tokens: int,
        max_waiting: int,
        clock: Callable[[], float],
        on_admit: Callable[[Sequence], None],
    ):
        """`prefill_tokens` bounds the prompt tokens of one tick, and so how long a tick keeps decoding rows waiting."""
        self.path = path
        self.slots = SlotPool(slots)
        self.rows = Rows(slots)
        self.running: dict[int, Sequence] = {}  # by slot
        self.requests: dict[str, Request] = {}  # waiting or running
        self.tick = 0
        self._prefill_tokens = prefill_tokens
        self._max_waiting = max_waiting
        self._clock = clock
        self._on_admit = on_admit
        self._waiting: list[tuple[int, int, Request]] = []
        self._order = itertools.count()
        self._prefilling: list[Sequence] = []
        self._deadlines: list[tuple[float, str]] = []

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InvalidArgumentError or OverloadedError."""
        if request.id in self.requests:
            raise InvalidArgumentError("request_id", request.id, "is already running")
        if request.params.n > self.slots.capacity:
            raise InvalidArgumentError("n", request.params.n, f"this model has {self.slots.capacity} slots")
        if len(self._waiting) >= self._max_waiting:
            raise OverloadedError(f"the queue is full: {len(self._waiting)} requests are waiting")
        request.arrival = self._clock()
        self.requests[request.id] = request
        heapq.heappush(self._waiting, (-request.priority, next(self._order), request))
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))

    def load(self) -> Load:
        return Load(self.slots.capacity, self.slots.used, len(self._waiting))

    def expired(self) -> Iterator[Request]:
        """Requests whose deadline has passed."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            if request_id in self.requests:
                yield self.requests[request_id]

    def schedule(self) -> Tick | None:
        """Admit what fits, then choose a stage and everything that is parked there."""
        self._admit()
        slots = np.flatnonzero(self.rows.node != IDLE)
        chunks = self._chunks()
        if not len(slots) and not chunks:
            return None
        self.tick += 1
        return Tick(self.path.nodes[0].stage, slots, chunks, final=True)

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0][2]
            if self.slots.available < request.params.n:
                return
            heapq.heappop(self._waiting)
            request.admitted = self._clock()
            for index in range(request.params.n):
                slot = self.slots.allocate()
                sequence = Sequence(request, index, slot, derive(request.seed, index))
                request.sequences.append(sequence)
                self.running[slot] = sequence
                self._on_admit(sequence)
            self._prefilling.append(request.sequences[0])

    def _chunks(self) -> list[Chunk]:
        """The next prompt tokens, first come first served, as many as one tick may hold."""
        chunks = []
        left = self._prefill_tokens
        for sequence in self._prefilling:
            if left <= 0:
                break
            prompt = sequence.request.prompt
            start = sequence.prefilled
            ids = np.array(prompt[start : start + left], np.int64)
            chunks.append(Chunk(sequence, ids, start))
            left -= len(ids)
        return chunks

    def prefilled(self, chunk: Chunk) -> None:
        """A chunk is through."""
        chunk.sequence.prefilled += len(chunk.ids)
        if chunk.last:
            self._prefilling.remove(chunk.sequence)

    def pass_on(self, sequence: Sequence) -> None:
        """If the sequence is prefilling on behalf of siblings, let one of them take its slot and go on."""
        heirs = [s for s in sequence.request.sequences if s is not sequence and s.finished is None]
        if sequence not in self._prefilling or not heirs:
            return
        heir = heirs[0]
        heir.slot, sequence.slot = sequence.slot, heir.slot
        heir.prefilled = sequence.prefilled
        self.running[heir.slot], self.running[sequence.slot] = heir, sequence
        self._prefilling[self._prefilling.index(sequence)] = heir

    def finish(self, sequence: Sequence) -> bool:
        """Free the slot of a sequence; whether it was the last of its request."""
        request = sequence.request
        self.rows.drop(sequence.slot)
        self.slots.free(sequence.slot)
        del self.running[sequence.slot]
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        if any(s.finished is None for s in request.sequences):
            return False
        del self.requests[request.id]
        return True

    def withdraw(self, request: Request) -> None:
        """Take a request out of the queue."""
        self._waiting = [entry for entry in self._waiting if entry[2] is not request]
        heapq.heapify(self._waiting)
        del self.requests[request.id]
