"""One run from start to result."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from math import ceil, inf
from typing import Any

import numpy as np

from loadtest import arrivals, traces
from loadtest.arrivals import Profile
from loadtest.clock import LoopClock
from loadtest.config import Run, flag
from loadtest.core import Model, Transport
from loadtest.driver import Driver, Plan
from loadtest.errors import FlagError
from loadtest.monitor import Monitor, quiet_collector
from loadtest.outcome import Outcome, conclude
from loadtest.progress import Progress
from loadtest.result import Result
from loadtest.transports import transport
from loadtest.workload import Workload

DEFAULT_DURATION = 30.0  # seconds of an open loop
DEFAULT_WAVES = 4  # requests of each user of a closed one
_NO_SIGNALS = (NotImplementedError, ValueError, RuntimeError)  # on Windows, or beside the main thread
_LEAD = 0.02  # seconds between the last preparations and the first request


async def measure(run: Run, progress: bool = True) -> Result:
    """Raises FlagError or TargetError. An interrupt ends the run, with the figures so far."""
    chosen = transport(run.server)
    try:
        return await drive(run, chosen, await chosen.connect(), progress)
    finally:
        await chosen.close()


async def drive(run: Run, chosen: Transport, model: Model, progress: bool = True) -> Result:
    """Measure over a transport that is connected."""
    workload = Workload(run, model)
    plan = make_plan(run, workload)
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    clock = LoopClock()
    driver = Driver(clock, chosen, workload.sessions(), due_times(run, workload), plan, _setter(finished))
    monitor = Monitor(clock)
    started = datetime.now(UTC)
    try:
        with (
            quiet_collector(),
            _faults(finished),
            _interrupts(driver),
            Progress(clock, driver, plan, shown=progress),
        ):
            driver.prepare()
            monitor.start()
            driver.start(clock.now() + _LEAD)
            await finished
            monitor.stop()
            stopped = clock.now()
    finally:
        clock.close()
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    return conclude(Outcome(run, model, workload, driver, monitor, started, stopped, chosen.streams, loop))


def make_plan(run: Run, workload: Workload) -> Plan:
    load = run.load
    for name in ("arrival", "burstiness"):
        if getattr(load, name) is not None and not run.open:
            raise FlagError(flag(name), getattr(load, name), "needs --rate")
    users = 0 if run.open else load.concurrency or 1
    requests: float = load.requests or inf
    duration = load.duration or inf
    if workload.size:
        if load.requests and load.requests > workload.size:
            raise FlagError("--requests", load.requests, f"the trace has {workload.size}")
        requests = min(requests, workload.size)
    elif requests == duration == inf:
        requests = DEFAULT_WAVES * users if users else inf
        duration = inf if users else DEFAULT_DURATION
    drain = run.server.timeout if load.drain is None else load.drain
    return Plan(users, requests, duration, load.ramp_up, run.server.timeout, drain)


def due_times(run: Run, workload: Workload) -> Iterator[float] | None:
    """When sessions begin, in seconds from the start. None in a closed loop."""
    load, work = run.load, run.work
    if not run.open:
        return None
    if workload.rows:
        starts = [row.at for row in workload.rows[:: work.turns]]
        span = starts[-1]
        natural = len(workload.rows) / span if span else inf
        speed = load.rate / natural if load.rate and span else load.trace_speed or 1.0
        return iter([start / speed for start in starts])
    assert load.rate is not None
    burstiness, process = load.burstiness or 1.0, load.arrival
    if process is None:
        process = "gamma" if load.burstiness else "poisson"
        if work.synthetic and not load.burstiness:
            process, burstiness = "gamma", traces.PUBLISHED[work.synthetic].burstiness
    rate = load.rate / work.turns  # of sessions, so that --rate is that of the requests
    profile = Profile.flat(rate)
    if load.ramp_from is not None:
        profile = Profile.ramp(load.ramp_from / work.turns, rate, load.duration or 0.0, load.ramp_steps)
    if load.duration is None and load.requests is not None:
        total = float(ceil(load.requests / work.turns))
    else:
        total = profile.expected(load.duration or DEFAULT_DURATION)
    rng = np.random.default_rng([load.seed, 0])
    return arrivals.arrivals(profile, process, burstiness, rng, total)


def _setter(finished: "asyncio.Future[None]") -> Callable[[], None]:
    def finish() -> None:
        if not finished.done():
            finished.set_result(None)

    return finish


@contextlib.contextmanager
def _faults(finished: "asyncio.Future[None]") -> Iterator[None]:
    """A fault in a callback ends the run with its exception: figures without what it lost would be wrong."""
    loop = asyncio.get_running_loop()

    def fault(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not finished.done():
            finished.set_exception(context.get("exception") or RuntimeError(context["message"]))

    before = loop.get_exception_handler()
    loop.set_exception_handler(fault)
    try:
        yield
    finally:
        loop.set_exception_handler(before)


@contextlib.contextmanager
def _interrupts(driver: Driver) -> Iterator[None]:
    """The first Ctrl-C ends the run and keeps its figures; a second one ends the program."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        driver.interrupt()

    with contextlib.suppress(*_NO_SIGNALS):
        loop.add_signal_handler(signal.SIGINT, first)
    try:
        yield
    finally:
        with contextlib.suppress(*_NO_SIGNALS):
            loop.remove_signal_handler(signal.SIGINT)
