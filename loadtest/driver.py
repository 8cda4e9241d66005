"""Sends the requests of a run, by the clock or as their users get answers. Knows neither the network nor
asyncio."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, nan
from typing import Any

from loadtest.clock import Clock
from loadtest.core import Handle, Request, Sample, Transport
from loadtest.recorder import Recorder
from loadtest.workload import Session

BURST = 32  # requests sent at one wake-up before the sockets are read again
AHEAD = 256  # requests made before they are due
PAUSE = (
    0.1  # seconds that a user of a closed loop waits after a failure, so that a broken server is not flooded
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is sent, and how. Times in seconds from the start."""

    users: int = 0  # of a closed loop; 0 in an open one
    requests: float = inf
    duration: float = inf  # of sending
    ramp_up: float = 0.0  # over which the users of a closed loop start
    timeout: float = inf  # of each request
    drain: float = inf  # from the last request sent to giving up the rest


@dataclass(slots=True)
class _Ready:
    """A first turn, made before it is due."""

    arrival: float  # seconds from the start
    session: Session
    request: Request
    encoded: Any


class Driver:
    """`finished` is called once, when nothing is under way and nothing more is to be sent."""

    def __init__(
        self,
        clock: Clock,
        transport: Transport,
        sessions: Iterator[Session],
        arrivals: Iterator[float] | None,
        plan: Plan,
        finished: Callable[[], object],
    ):
        self.recorder = Recorder()
        self.origin = nan
        self.sent = 0
        self.unfinished = 0
        self.full = nan  # when all users of a closed loop had started
        self.last_sent = nan
        self.interrupted = False
        self._clock = clock
        self._transport = transport
        self._sessions = sessions
        self._arrivals = arrivals
        self._plan = plan
        self._finished = finished
        self._in_flight: dict[int, tuple[float, Handle | None]] = {}  # deadline and handle, by number
        self._thinking = 0  # sessions between two turns
        self._starting = True  # sessions
        self._sending = True  # further turns of those that have started
        self._over = False
        self._ready: deque[_Ready] = deque()
        self._preparing = False

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def start(self, when: float) -> None:
        """Begin at that time of the clock."""
        self.origin = when
        plan = self._plan
        if self._arrivals is not None:
            self._clock.at(when, self._pump)
        else:
            for user in range(plan.users):
                self._clock.at(when + plan.ramp_up * user / plan.users, self._user)
            self.full = when + plan.ramp_up * (plan.users - 1) / plan.users
        if plan.duration < inf:
            self._clock.at(when + plan.duration, self._stop)
        if plan.timeout < inf:
            self._clock.at(when + plan.timeout, self._sweep)

    def interrupt(self) -> None:
        """Send no more and give up what is under way."""
        self.interrupted = True
        self._stop()
        self._give_up()

    # -- open loop -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the first requests of an open loop, before it starts."""
        while self._arrivals is not None and len(self._ready) < AHEAD and self._prepare_one():
            pass

    def _pump(self) -> None:
        now = self._clock.now()
        for _ in range(BURST):
            if (
                not self._sending
                or self.sent >= self._plan.requests
                or not (self._ready or self._prepare_one())
            ):
                self._start_no_more()
                return
            if self.origin + self._ready[0].arrival > now:
                break
            ready = self._ready.popleft()
            self._send(ready.session, ready.request, ready.encoded, self.origin + ready.arrival)
        self._clock.at(self.origin + self._ready[0].arrival if self._ready else now, self._pump)
        if not self._preparing:
            self._preparing = True
            self._clock.soon(self._prepare_on)

    def _prepare_on(self) -> None:
        """One at a time, so that a burst finds its requests made and no message waits for their making."""
        if self._sending and len(self._ready) < AHEAD and self._prepare_one():
            self._clock.soon(self._prepare_on)
        else:
            self._preparing = False

    def _prepare_one(self) -> bool:
        """Whether there was one more."""
        assert self._arrivals is not None
        if self.sent + len(self._ready) >= self._plan.requests:
            return False
        arrival = next(self._arrivals, None)
        session = None if arrival is None or arrival >= self._plan.duration else next(self._sessions, None)
        if arrival is None or session is None:
            return False
        request = session.next()
        self._ready.append(_Ready(arrival, session, request, self._transport.encode(request)))
        return True

    # -- closed loop -----------------------------------------------------------------------------------------

    def _user(self) -> None:
        wanted = self._starting and self.sent < self._plan.requests
        session = next(self._sessions, None) if wanted else None
        if session is None:
            self._start_no_more()
            return
        self._next_turn(session, None, None)

    # -- both ------------------------------------------------------------------------------------------------

    def _next_turn(self, session: Session, last: Sample | None, intended: float | None) -> None:
        """`intended`: when its user wanted it sent; None for now."""
        if last is not None:
            self._thinking -= 1
        if not self._sending or self.sent >= self._plan.requests:
            self._start_no_more()
            return
        request = session.next(last)
        self._send(session, request, self._transport.encode(request), intended)

    def _send(self, session: Session, request: Request, encoded: Any, intended: float | None) -> None:
        number = self.sent
        self.sent += 1
        sample = Sample(
            intended=nan,
            asked=request.max_tokens,
            policy=request.depth.label if request.depth else "",
            turn=session.turn,
            keep=session.keep,
            prompt_tokens=request.prompt_tokens,
        )
        self._in_flight[number] = (inf, None)
        sample.sent = self.last_sent = self._clock.now()
        sample.intended = sample.sent if intended is None else intended
        handle = self._transport.send(encoded, sample, lambda done: self._done(number, session, done))
        if number in self._in_flight:
            self._in_flight[number] = (sample.sent + self._plan.timeout, handle)

    def _done(self, number: int, session: Session, sample: Sample) -> None:
        if self._in_flight.pop(number, None) is None or self._over:
            return
        self.recorder.add(sample)
        failed = sample.status != "OK"
        if session.more and not failed:
            when = sample.end + session.think_time
            self._thinking += 1
            if session.think_time:
                self._clock.at(when, self._next_turn, session, sample, when)
            else:
                self._clock.soon(self._next_turn, session, sample, when)
        elif self._plan.users and self._starting:
            if failed:
                self._clock.at(sample.end + PAUSE, self._user)
            else:
                self._clock.soon(self._user)
        self._check_finished()

    def _stop(self) -> None:
        """Send nothing more."""
        self._sending = False
        self._start_no_more()

    def _start_no_more(self) -> None:
        if self._starting:
            self._starting = False
            if self._plan.drain < inf:
                self._clock.at(self._clock.now() + self._plan.drain, self._drained)
        self._check_finished()

    def _drained(self) -> None:
        until = self.last_sent + self._plan.drain
        if until <= self._clock.now() or self.sent == 0:
            self._give_up()
        else:
            self._clock.at(until, self._drained)

    def _give_up(self) -> None:
        """Let go of what is under way, without recording it."""
        if self._over:
            return
        self._over = True
        left, self._in_flight = self._in_flight, {}
        self.unfinished = len(left)
        for _, handle in left.values():
            if handle:
                handle.cancel("CANCELLED", "given up by the harness")
        self._finished()

    def _sweep(self) -> None:
        """End the requests whose time is over. All have the same timeout, so the oldest are the first."""
        now = self._clock.now()
        for deadline, handle in list(self._in_flight.values()):
            if deadline > now:
                break
            if handle:
                handle.cancel("DEADLINE_EXCEEDED", f"no end within --timeout {self._plan.timeout:g} s")
        if not self._over:
            oldest = next(iter(self._in_flight.values()), None)
            self._clock.at(oldest[0] if oldest and oldest[0] > now else now + self._plan.timeout, self._sweep)

    def _check_finished(self) -> None:
        if not (self._starting or self._in_flight or self._thinking or self._over):
            self._over = True
            self._finished()
