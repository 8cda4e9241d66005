"""One run from start to result."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from math import inf

import numpy as np

from loadtest import analysis, arrivals, traces
from loadtest.analysis import Times
from loadtest.arrivals import Profile
from loadtest.clock import LoopClock
from loadtest.config import Run
from loadtest.core import Model, Transport
from loadtest.driver import Driver, Plan
from loadtest.errors import FlagError
from loadtest.histogram import Distribution
from loadtest.monitor import Monitor, quiet_collector
from loadtest.progress import Progress
from loadtest.result import Requests, Result
from loadtest.transports import transport
from loadtest.workload import Workload

DEFAULT_DURATION = 30.0  # seconds of an open loop
DEFAULT_WAVES = 4  # requests of each user of a closed one
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
    finished = asyncio.Event()
    clock = LoopClock()
    driver = Driver(clock, chosen, workload.sessions(), due_times(run, workload), plan, finished.set)
    monitor = Monitor(clock)
    started = datetime.now(UTC)
    with quiet_collector(), _interrupts(driver), Progress(clock, driver, plan, shown=progress):
        monitor.start()
        driver.start(clock.now() + _LEAD)
        await finished.wait()
        monitor.stop()
        stopped = clock.now()
    clock.close()
    return conclude(run, model, workload, driver, monitor, started, stopped, streams=chosen.streams)


def make_plan(run: Run, workload: Workload) -> Plan:
    load = run.load
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
    return arrivals.arrivals(profile, process, burstiness, np.random.default_rng([load.seed, 0]))


def conclude(
    run: Run,
    model: Model,
    workload: Workload,
    driver: Driver,
    monitor: Monitor,
    started: datetime,
    stopped: float,
    streams: bool = True,
) -> Result:
    everything = driver.recorder.columns()
    origin, open_loop = driver.origin, run.open
    rows = everything.where(everything.intended >= origin + run.load.warmup)
    done = rows.where(rows.ok)
    times = Times.of(done)
    begin = float(rows.sent.min()) if len(rows.sent) else stopped
    duration = (float(rows.end.max()) if len(rows.end) else stopped) - begin
    itl, message_gap = analysis.gaps(done) if streams else (Distribution(count=0), Distribution(count=0))
    offered, sent_rate = analysis.rate_between(rows.intended), analysis.rate_between(rows.sent)
    achieved = analysis.rate_between(done.end) if open_loop else _per_second(len(done.end), duration)
    full = (
        float(done.end.min()) if open_loop and len(done.end) else max(origin + run.load.warmup, driver.full)
    )
    statuses = [rows.statuses[i] for i in rows.status[~rows.ok].tolist()]
    tokens, prompts = int(times.tokens.sum()), int(done.prompt.sum())
    return Result(
        started_at=started.isoformat(timespec="seconds"),
        interrupted=driver.interrupted,
        loop="open" if open_loop else "closed",
        config={name: getattr(run, name).given() for name in ("server", "load", "work", "goals")},
        model={name: getattr(model, name) for name in Model.__slots__},
        duration_s=duration,
        requests=Requests(
            sent=driver.sent,
            warmup=len(everything.status) - len(rows.status),
            ok=len(done.status),
            failed=len(rows.status) - len(done.status),
            unfinished=driver.unfinished,
        ),
        failures={name: statuses.count(name) for name in sorted(set(statuses))},
        failure_details={name: rows.details[name] for name in sorted(set(statuses))},
        offered_rate=offered if open_loop else None,
        sent_rate=sent_rate,
        achieved_rate=achieved,
        output_tokens=tokens,
        output_tokens_per_s=_per_second(tokens, duration),
        input_tokens=prompts,
        input_tokens_per_s=_per_second(prompts, duration),
        ttft_ms=Distribution.of(times.ttft),
        tpot_ms=Distribution.of(times.tpot) if streams else Distribution(count=0),
        itl_ms=itl,
        message_gap_ms=message_gap,
        e2e_ms=Distribution.of(times.e2e),
        ttft_from_schedule_ms=Distribution.of(times.first - times.intended) if open_loop else None,
        e2e_from_schedule_ms=Distribution.of(times.last - times.intended) if open_loop else None,
        goodput=analysis.goodput(
            run.goals.slos, times, len(rows.status) + driver.unfinished, achieved, open_loop
        ),
        steady=analysis.steady(everything, full, driver.last_sent, origin),
        lengths=analysis.lengths(done, workload.scale.factor, workload.scale.clipped),
        mean_depth=analysis.weighted(done.mean_depth, times.tokens),
        flops_saved=analysis.weighted(done.flops_saved, times.tokens),
        cached_share=analysis.cached_share(done),
        policies={
            label: analysis.group(rows.where(rows.policy == i))
            for i, label in enumerate(rows.policies)
            if label
        },
        turns={str(i + 1): analysis.group(rows.where(rows.turn == i)) for i in range(run.work.turns)}
        if run.work.turns > 1
        else {},
        harness=monitor.verdict(
            rows.sent - rows.intended if open_loop else np.zeros(0),
            times.ttft,
            offered if open_loop else None,
            sent_rate,
            type(asyncio.get_running_loop()).__module__.partition(".")[0],
        ),
        timeline=analysis.timeline(everything, origin, stopped),
    )


def _per_second(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None


@contextlib.contextmanager
def _interrupts(driver: Driver) -> Iterator[None]:
    """The first Ctrl-C ends the run and keeps its figures; a second one ends the program."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        driver.interrupt()

    with contextlib.suppress(
        NotImplementedError, ValueError, RuntimeError
    ):  # not on Windows, not in a thread
        loop.add_signal_handler(signal.SIGINT, first)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)
