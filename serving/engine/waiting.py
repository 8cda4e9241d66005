"""The queue of requests that wait for slots: by priority, fair between those who ask, and bounded."""

import heapq
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from models.paths import Path
from serving.engine.core import Request
from serving.engine.demand import WINDOW, Demand
from serving.engine.params import MAX_PRIORITY

LASTING = 5
"""For so many times its target others have to be refused, at least that often, before a queue lets go of those who
wait."""

PATIENCE = 10
"""Times its target that anybody waits in it from then on."""


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

    Of one owner's requests the first comes first; while more come than can be served, the last does, of those who have
    no fewer places than others. All would wait long in their order; so some are served at once, and the others no
    later than not at all (adaptive LIFO: Maurer, Fail at Scale, ACM Queue 13(8), 2015). That is while the queue has
    been full of late, or has kept somebody waiting for longer than its target (Nichols and Jacobson, Controlling Queue
    Delay, ACM Queue 10(5), 2012) and grows."""

    def __init__(
        self,
        most: int = sys.maxsize,
        target_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        needed: int = sys.maxsize,
    ) -> None:
        """It is full with `most` requests: callers look, and do not push. Without a target only a full queue changes
        its order. `needed`: so many are enough to keep those busy who serve it."""
        self._most = most
        self._needed = min(needed, most)
        self._target_s = target_s
        self._clock = clock
        self._demand = Demand()
        self._hurried = 0  # how many turns yet the newest goes first
        self._growing = 0  # the same, as long as somebody waits for longer than the target
        self._refused = (
            -math.inf,
            -math.inf,
        )  # since when there have been refusals, one soon after the other, and the last
        self._heap: list[Place] = []
        self._requests: dict[str, Request] = {}  # by id, in the order of their arrival
        self._places: Counter[str] = Counter()  # by owner
        self._numbers = itertools.count()
        self._now = 0.0  # virtual time: the start of the request that was taken last
        self._ends: dict[str, float] = {}  # virtual end of each owner's newest request

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def most(self) -> int:
        """How many may wait."""
        return self._needed if self.overloaded else self._most

    @property
    def full(self) -> bool:
        return len(self._heap) >= self.most

    @property
    def overloaded(self) -> bool:
        """Whether it has been full for so long that it is of no use for it to be long."""
        if self._target_s is None:
            return False
        since, last = self._refused
        lasting = LASTING * self._target_s
        return last - since >= lasting >= self._clock() - last

    @property
    def newest_first(self) -> bool:
        return self._hurried > 0 or self._growing > 0

    def refused(self) -> None:
        """Somebody found it full."""
        self._hurried = max(1, self._most // 4)
        if self._target_s is not None:
            now, (since, last) = self._clock(), self._refused
            self._refused = (since if now - last <= LASTING * self._target_s else now), now

    def push(self, request: Request, path: Path) -> None:
        start = max(self._now, self._ends.get(request.owner, 0.0))
        given = 0 if request.reads_only else request.params.n * request.params.max_tokens
        self._ends[request.owner] = start + len(request.prompt) + given
        heapq.heappush(self._heap, Place(-request.priority, start, next(self._numbers), request, path))
        self._requests[request.id] = request
        self._places[request.owner] += 1
        self._demand.came()
        self._look()

    def first(self) -> tuple[Request, Path]:
        """Whose turn it is. Raises IndexError where nobody waits."""
        turn = self._turn()
        return turn.request, turn.path

    def take(self) -> tuple[Request, Path]:
        """Likewise, and out of the queue."""
        turn, first = self._turn(), self._heap[0]
        self._remove(turn, first)
        self._now = max(self._now, first.start)
        self._hurried, self._growing = max(0, self._hurried - 1), max(0, self._growing - 1)
        self._demand.served()
        self._look()
        if not self._heap:  # nobody has to wait for anybody
            self._ends.clear()
        return turn.request, turn.path

    def crowd(self) -> tuple[str, int]:
        """The owner who has most places, and how many. Any thread may ask."""
        return max(list(self._places.items()), key=lambda item: (item[1], item[0]), default=("", 0))

    def make_room(self, request: Request) -> Request | None:
        """Takes a place from the owner who has most of them, two more than the owner of `request` at least, and
        returns who had it, the last of them to have had their turn: a full queue is shared fairly, too. None where
        nobody has, at this priority or below."""
        owner, most = self.crowd()
        theirs = [
            p for p in self._heap if p.request.owner == owner and p.request.priority <= request.priority
        ]
        if most < self._places[request.owner] + 2 or not theirs:
            return None
        last = max(theirs)
        if self.newest_first:
            last = min(self._alike(last))
        self._refuse(last)
        return last.request

    def give_up(self) -> list[Request]:
        """Takes out those whose turn is not going to come: where it is overloaded, the oldest of those that are too
        many, of whoever has no fewer places than others, and who has waited for too long. Not those who have had their
        place elsewhere, or a part of their answer."""
        if self._target_s is None or not self.overloaded:
            return []
        most, latest, given_up = self.most, self._clock() - PATIENCE * self._target_s, []
        for request in [r for r in self._requests.values() if r.priority <= MAX_PRIORITY and not r.resumed]:
            if request.arrival <= latest or (len(self._heap) > most and self._crowds(request.owner)):
                self._refuse(self._place(request))
                given_up.append(request)
        return given_up

    def oldest(self) -> float | None:
        """When the one who waits longest arrived."""
        return next((request.arrival for request in self._requests.values()), None)

    def withdraw(self, request: Request) -> None:
        """Somebody does not want to wait any more."""
        self._refuse(self._place(request))
        self._demand.went()

    def _turn(self) -> Place:
        first = self._heap[0]
        owner, priority = first.request.owner, first.request.priority
        crowds = self._target_s is None or self._crowds(owner)
        if self.newest_first and crowds and priority <= MAX_PRIORITY:  # those above had their place elsewhere
            return max(self._alike(first))
        return first

    def _crowds(self, owner: str) -> bool:
        """Whether somebody has no less than their share of the places."""
        return self._places[owner] * len(self._places) >= len(self._heap)

    def _look(self) -> None:
        """Whether the newest is to go first, from now on."""
        oldest = self.oldest()
        if self._target_s is None or oldest is None or self._clock() - oldest <= self._target_s:
            self._growing = 0
        elif self._demand.exceeds(len(self._heap)):
            self._growing = WINDOW

    def _place(self, request: Request) -> Place:
        return next(place for place in self._heap if place.request is request)

    def _refuse(self, place: Place) -> None:
        """Take somebody out who has not been served: for work that will not be done nobody is to wait."""
        owner, last = place.request.owner, max(self._alike(place))
        self._remove(place, last)
        if self._ends.get(owner, 0.0) > last.start:
            self._ends[owner] = last.start

    def _remove(self, place: Place, freed: Place) -> None:
        """Take somebody out. Those with whom only the order of arrival decided keep it, in all places but `freed`."""
        del self._requests[place.request.id]
        self._places[place.request.owner] -= 1
        if not self._places[place.request.owner]:
            del self._places[place.request.owner]
        if place is freed is self._heap[0]:
            heapq.heappop(self._heap)
            return
        alike = sorted(self._alike(place))
        others = [other for other in self._heap if not _alike(other, place)]
        stay, places = ([p for p in alike if p is not gone] for gone in (place, freed))
        self._heap = [*others, *map(Place.taken_by, places, stay)]
        heapq.heapify(self._heap)

    def _alike(self, place: Place) -> list[Place]:
        return [other for other in self._heap if _alike(other, place)]


def _alike(a: Place, b: Place) -> bool:
    """Whether only the order of arrival decides between them."""
    return a.rank == b.rank and a.request.owner == b.request.owner
