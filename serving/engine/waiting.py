"""The queue of requests that wait for slots: by priority, fair between those who ask, and bounded."""

import heapq
import itertools
import sys
from collections import Counter
from typing import NamedTuple

from models.paths import Path
from serving.engine.core import Request
from serving.engine.params import MAX_PRIORITY


class Place(NamedTuple):
    """A place in the queue, and who has it. The least goes first; of one owner's at one priority the first to come has
    the least."""

    rank: int
    start: float  # in virtual time
    number: int
    request: Request
    path: Path

    def taken_by(self, other: "Place") -> "Place":
        return self._replace(request=other.request, path=other.path)


class WaitingQueue:
    """Start-time fair queuing (Goyal, Vin and Cheng 1996): a request's turn comes after as much work as its owner has
    already asked for. Whoever was idle begins at the present, and saves up nothing.

    Of one owner's requests the first comes first; while the queue has been full of late, the last does. Where more
    come than can be served all would wait long in their order; so some are served at once, and the others no
    later than not at all (adaptive LIFO: Maurer, Fail at Scale, ACM Queue 13(8), 2015)."""

    def __init__(self, most: int = sys.maxsize) -> None:
        """It is full with `most` requests: callers look, and do not push."""
        self._most = most
        self._hurried = 0  # how many turns yet the newest goes first
        self._heap: list[Place] = []
        self._numbers = itertools.count()
        self._now = 0.0  # virtual time: the start of the request that was taken last
        self._ends: dict[str, float] = {}  # virtual end of each owner's newest request

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def most(self) -> int:
        return self._most

    @property
    def full(self) -> bool:
        return len(self._heap) >= self._most

    def refused(self) -> None:
        """Somebody found it full."""
        self._hurried = max(1, self._most // 4)

    def push(self, request: Request, path: Path) -> None:
        start = max(self._now, self._ends.get(request.owner, 0.0))
        given = 0 if request.reads_only else request.params.n * request.params.max_tokens
        self._ends[request.owner] = start + len(request.prompt) + given
        heapq.heappush(self._heap, Place(-request.priority, start, next(self._numbers), request, path))

    def first(self) -> tuple[Request, Path]:
        """Whose turn it is. Raises IndexError where nobody waits."""
        turn = self._turn()
        return turn.request, turn.path

    def take(self) -> tuple[Request, Path]:
        """Likewise, and out of the queue."""
        turn, first = self._turn(), heapq.heappop(self._heap)
        if turn is not first:  # each of the others moves into the place of the next
            places = sorted(place for place in self._heap if _alike(place, first))
            others = [place for place in self._heap if not _alike(place, first)]
            moved = map(Place.taken_by, places, [first, *places])
            self._heap = [*others, *moved]
            heapq.heapify(self._heap)
        self._now = max(self._now, first.start)
        self._hurried = max(0, self._hurried - 1)
        if not self._heap:  # nobody has to wait for anybody
            self._ends.clear()
        return turn.request, turn.path

    def _turn(self) -> Place:
        first = self._heap[0]
        if not self._hurried or first.request.priority > MAX_PRIORITY:  # those had their place elsewhere
            return first
        return max(place for place in self._heap if _alike(place, first))

    def make_room(self, request: Request) -> Request | None:
        """Takes the last place from the owner who has most of them, two more than the owner of `request` at least, and
        returns who had it: a full queue is shared fairly, too. None where nobody has, at this priority or below."""
        counts = Counter(place.request.owner for place in self._heap)
        owner, most = max(counts.items(), key=lambda item: (item[1], item[0]), default=("", 0))
        theirs = [
            p for p in self._heap if p.request.owner == owner and p.request.priority <= request.priority
        ]
        if most < counts[request.owner] + 2 or not theirs:
            return None
        last = max(theirs)
        self.withdraw(last.request)
        if self._ends.get(owner, 0.0) > last.start:
            self._ends[owner] = last.start  # for work that will not be done nobody is to wait
        return last.request

    def oldest(self) -> float | None:
        """When the one who waits longest arrived."""
        return min((place.request.arrival for place in self._heap), default=None)

    def withdraw(self, request: Request) -> None:
        self._heap = [place for place in self._heap if place.request is not request]
        heapq.heapify(self._heap)


def _alike(a: Place, b: Place) -> bool:
    """Whether only the order of arrival decides between them."""
    return a.rank == b.rank and a.request.owner == b.request.owner
