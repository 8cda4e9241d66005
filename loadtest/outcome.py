"""From a run that is over to its result."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from loadtest import analysis
from loadtest.analysis import Times
from loadtest.config import Run
from loadtest.core import Model
from loadtest.driver import Driver
from loadtest.histogram import Distribution
from loadtest.monitor import Monitor
from loadtest.recorder import Columns
from loadtest.result import Group, Requests, Result
from loadtest.workload import Workload

_NOTHING = Distribution(count=0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that is known of a run."""

    run: Run
    model: Model
    workload: Workload
    driver: Driver
    monitor: Monitor
    started: datetime
    stopped: float  # seconds of the driver's clock
    streams: bool  # whether tokens arrived as they were made; without, the times between them mean nothing
    event_loop: str


def conclude(outcome: Outcome) -> Result:
    """Every figure, over the requests after the warm-up."""
    run, driver = outcome.run, outcome.driver
    everything = driver.recorder.columns()
    rows = everything.where(everything.intended >= driver.origin + run.load.warmup)
    done = rows.where(rows.ok)
    times = Times.of(done)
    duration = _duration(rows)
    itl, message_gap = analysis.gaps(done) if outcome.streams else (_NOTHING, _NOTHING)
    offered = analysis.rate_between(rows.intended) if run.open else None
    sent = analysis.rate_between(rows.sent)
    achieved = analysis.rate_between(done.end) if run.open else _per_second(len(done.end), duration)
    tokens, prompts = int(times.tokens.sum()), int(done.prompt.sum())
    delays = rows.sent - rows.intended if run.open else np.zeros(0)
    failures = _failures(rows)
    return Result(
        started_at=outcome.started.isoformat(timespec="seconds"),
        interrupted=driver.interrupted,
        loop="open" if run.open else "closed",
        config={name: getattr(run, name).given() for name in ("server", "load", "work", "goals")},
        model=_plain(outcome.model),
        duration_s=duration,
        requests=_requests(driver, everything, rows),
        failures=failures,
        failure_details={status: rows.details[status] for status in failures},
        offered_rate=offered,
        sent_rate=sent,
        achieved_rate=achieved,
        output_tokens=tokens,
        output_tokens_per_s=_per_second(tokens, duration),
        input_tokens=prompts,
        input_tokens_per_s=_per_second(prompts, duration),
        ttft_ms=Distribution.of(times.ttft),
        tpot_ms=Distribution.of(times.tpot) if outcome.streams else _NOTHING,
        itl_ms=itl,
        message_gap_ms=message_gap,
        e2e_ms=Distribution.of(times.e2e),
        ttft_from_schedule_ms=Distribution.of(times.first - times.intended) if run.open else None,
        e2e_from_schedule_ms=Distribution.of(times.last - times.intended) if run.open else None,
        goodput=analysis.goodput(
            run.goals.slos, times, len(rows.status) + driver.unfinished, achieved, run.open
        ),
        steady=analysis.steady(everything, _full_load(outcome, done), driver.last_sent, driver.origin),
        lengths=analysis.lengths(done, outcome.workload.scale.factor, outcome.workload.scale.clipped),
        mean_depth=analysis.weighted(done.mean_depth, times.tokens),
        flops_saved=analysis.weighted(done.flops_saved, times.tokens),
        cached_share=analysis.cached_share(done),
        policies=_by_policy(rows),
        turns=_by_turn(rows, run.work.turns),
        harness=outcome.monitor.verdict(delays, times.ttft, offered, sent, outcome.event_loop),
        timeline=analysis.timeline(everything, driver.origin, outcome.stopped),
    )


def _plain(model: Model) -> dict[str, Any]:
    values = {name: getattr(model, name) for name in Model.__slots__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _duration(rows: Columns) -> float:
    """Seconds from the first request to the end of the last."""
    return float(rows.end.max() - rows.sent.min()) if len(rows.end) else 0.0


def _full_load(outcome: Outcome, done: Columns) -> float:
    """When the load was fully on: in an open loop, once the first requests end and others replace them."""
    if outcome.run.open and len(done.end):
        return float(done.end.min())
    return max(outcome.driver.origin + outcome.run.load.warmup, outcome.driver.full)


def _requests(driver: Driver, everything: Columns, rows: Columns) -> Requests:
    ok = int(rows.ok.sum())
    return Requests(
        sent=driver.sent,
        warmup=len(everything.status) - len(rows.status),
        ok=ok,
        failed=len(rows.status) - ok,
        unfinished=driver.unfinished,
    )


def _failures(rows: Columns) -> dict[str, int]:
    statuses, counts = np.unique(rows.status[~rows.ok], return_counts=True)
    named = zip(statuses.tolist(), counts.tolist(), strict=True)
    return dict(sorted((rows.statuses[status], count) for status, count in named))


def _by_policy(rows: Columns) -> dict[str, Group]:
    return {
        label: analysis.group(rows.where(rows.policy == i)) for i, label in enumerate(rows.policies) if label
    }


def _by_turn(rows: Columns, turns: int) -> dict[str, Group]:
    if turns == 1:
        return {}
    return {str(turn + 1): analysis.group(rows.where(rows.turn == turn)) for turn in range(turns)}


def _per_second(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None
