"""The queue of requests that wait for slots: by priority, and fair between those who ask."""

import heapq
import itertools

from models.paths import Path
from serving.engine.core import Request


class WaitingQueue:
    """Start-time fair queuing (Goyal, Vin and Cheng 1996): a request's turn comes after as much work as its owner has
    already asked for. Of one owner's requests the first comes first. Whoever was idle begins at the present, and
    saves up nothing."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request, Path]] = []
        self._order = itertools.count()
        self._now = 0.0  # virtual time: the start of the request that was taken last
        self._ends: dict[str, float] = {}  # virtual end of each owner's newest request

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, request: Request, path: Path) -> None:
        start = max(self._now, self._ends.get(request.owner, 0.0))
        given = 0 if request.reads_only else request.params.n * request.params.max_tokens
        self._ends[request.owner] = start + len(request.prompt) + given
        heapq.heappush(self._heap, (-request.priority, start, next(self._order), request, path))

    def first(self) -> tuple[Request, Path]:
        """Whose turn it is. Raises IndexError where nobody waits."""
        return self._heap[0][3:]

    def take(self) -> tuple[Request, Path]:
        """Likewise, and out of the queue."""
        _, start, _, request, path = heapq.heappop(self._heap)
        self._now = max(self._now, start)
        if not self._heap:  # nobody has to wait for anybody
            self._ends.clear()
        return request, path

    def oldest(self) -> float | None:
        """When the one who waits longest arrived."""
        return min((entry[3].arrival for entry in self._heap), default=None)

    def withdraw(self, request: Request) -> None:
        self._heap = [entry for entry in self._heap if entry[3] is not request]
        heapq.heapify(self._heap)
