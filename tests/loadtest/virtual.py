"""Virtual time, and a server that is only arithmetic."""

import heapq
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from typing import Any

from loadtest.config import Goals, Load, Run, Server, Work
from loadtest.core import Done, Handle, Model, Request, Sample
from loadtest.driver import Driver
from loadtest.monitor import Monitor
from loadtest.outcome import Outcome, conclude
from loadtest.result import Result
from loadtest.run import due_times, make_plan
from loadtest.workload import Workload


class VirtualClock:
    """Time passes when nothing is left to do at the present."""

    def __init__(self, start: float = 0.0) -> None:
        self.time = start
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = count()

    def now(self) -> float:
        return self.time

    def at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        heapq.heappush(self._heap, (max(when, self.time), next(self._order), callback, args))

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        self.at(self.time, callback, *args)

    def run(self, until: float = float("inf")) -> None:
        while self._heap and self._heap[0][0] <= until:
            when, _, callback, args = heapq.heappop(self._heap)
            self.time = max(self.time, when)
            callback(*args)


class VirtualTransport:
    """Token i of a request is due `ttft + i * itl` seconds after it was taken up; `slots` at a time are."""

    streams = True

    def __init__(self, clock: VirtualClock, ttft: float = 0.05, itl: float = 0.005, slots: int = 1 << 30):
        self.clock = clock
        self.ttft, self.itl, self.slots = ttft, itl, slots
        self.sent: list[Request] = []
        self.times: list[float] = []
        self.fail: Callable[[int], bool] = lambda number: False
        self.active = self.most = 0
        self._waiting: list[_Call] = []

    async def connect(self) -> Model:
        return Model("virtual")

    def encode(self, request: Request) -> Request:
        return request

    def send(self, encoded: Request, sample: Sample, done: Done) -> Handle:
        call = _Call(self, len(self.sent), encoded, sample, done)
        self.sent.append(encoded)
        self.times.append(self.clock.now())
        self._waiting.append(call)
        self._admit()
        return call

    async def close(self) -> None: ...

    def _admit(self) -> None:
        while self._waiting and self.active < self.slots:
            self.active += 1
            self.most = max(self.most, self.active)
            self._waiting.pop(0).begin()


class _Call:
    def __init__(self, server: VirtualTransport, number: int, request: Request, sample: Sample, done: Done):
        self.server, self.number, self.request, self.sample, self.done = server, number, request, sample, done
        self.left = request.max_tokens

    def begin(self) -> None:
        self.server.clock.at(self.server.clock.now() + self.server.ttft, self._token)

    def _token(self) -> None:
        if self.sample.status:
            return
        now = self.server.clock.now()
        if self.server.fail(self.number):
            self._end("INTERNAL", "asked to")
            return
        self.sample.arrived(now, 1)
        self.left -= 1
        if self.sample.keep:
            self.sample.tokens.append(self.left)
            self.sample.text += f"<{self.left}>"
        if self.left:
            self.server.clock.at(now + self.server.itl, self._token)
        else:
            self._end("OK", "")

    def cancel(self, status: str, detail: str) -> None:
        if not self.sample.status:
            self._end(status, detail)

    def _end(self, status: str, detail: str) -> None:
        self.server.active -= 1
        self.sample.finish(self.server.clock.now(), status, detail)
        self.done(self.sample)
        self.server._admit()


def a_run(**flags: Any) -> Run:
    """A configuration from flags, whichever group they belong to."""
    groups = {"server": Server, "load": Load, "work": Work, "goals": Goals}
    flags = {"target": "localhost:1", **flags}
    values = {
        name: {flag: value for flag, value in flags.items() if flag in group.model_fields}
        for name, group in groups.items()
    }
    assert sum(map(len, values.values())) == len(flags), flags
    return Run(**{name: group.read(values[name]) for name, group in groups.items()})


def result_of(
    *, server: dict[str, Any] | None = None, fail: Callable[[int], bool] | None = None, **flags: Any
) -> Result:
    """The result of a run in virtual time."""
    clock = VirtualClock(1000.0)
    transport = VirtualTransport(clock, **(server or {}))
    transport.fail = fail or transport.fail
    run, model, monitor = a_run(**flags), Model("virtual"), Monitor(clock)
    workload = Workload(run, model)
    driver = Driver(
        clock,
        transport,
        workload.sessions(),
        due_times(run, workload),
        make_plan(run, workload),
        monitor.stop,
    )
    monitor.start()
    driver.start(clock.now())
    clock.run()
    return conclude(
        Outcome(
            run,
            model,
            workload,
            driver,
            monitor,
            datetime.now(UTC),
            clock.now(),
            transport.streams,
            "virtual",
        )
    )
