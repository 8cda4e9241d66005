"""The highest rate at which a server meets its objectives: doubled until it fails, then halved in."""

from __future__ import annotations

from math import sqrt
from typing import Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.table import Table

from loadtest.config import Flags, Run
from loadtest.errors import FlagError
from loadtest.result import Result
from loadtest.run import drive
from loadtest.table import number, share
from loadtest.transports import transport

SCHEMA: Literal["fathom.loadtest.search/1"] = "fathom.loadtest.search/1"
DEFAULT_DURATION = 20.0  # seconds of each probe
KEPT_UP = 0.95  # share of the offered rate that a server must achieve; below, its queue grows without end


class Search(Flags):
    attainment: float = Field(0.99, gt=0, le=1)
    first_rate: float = Field(1.0, gt=0)
    last_rate: float = Field(10_000.0, gt=0)
    tolerance: float = Field(0.05, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.last_rate < self.first_rate:
            raise FlagError(
                "--last-rate", self.last_rate, f"must be at least --first-rate {self.first_rate:g}"
            )
        return self


class Probe(BaseModel):
    """One run at one rate."""

    model_config = ConfigDict(frozen=True)

    rate: float
    met: bool
    why: str  # it did not meet the objectives; empty where it did
    result: Result


class Found(BaseModel):
    """`rate` is None where the first rate already failed."""

    model_config = ConfigDict(frozen=True)

    schema_: Literal["fathom.loadtest.search/1"] = Field(
        default=SCHEMA, validation_alias=AliasChoices("schema", "schema_"), serialization_alias="schema"
    )
    rate: float | None
    attainment: float
    slos_ms: dict[str, float]
    config: dict[str, dict[str, Any]]
    interrupted: bool
    ended: str  # why the search did
    probes: list[Probe]  # in the order in which they were made


async def find_rate(run: Run, wanted: Search, progress: bool = True) -> Found:
    """Raises FlagError or TargetError."""
    run = _prepared(run)
    chosen = transport(run.server)
    probes: list[Probe] = []
    low, high, rate = 0.0, float("inf"), wanted.first_rate
    ended = ""
    try:
        model = await chosen.connect()
        while not ended:
            load = run.load.model_copy(update={"rate": rate})
            result = await drive(run.model_copy(update={"load": load}), chosen, model, progress)
            if result.interrupted:
                ended = "interrupted"
                break
            why = _unmet(result, wanted.attainment)
            probes.append(Probe(rate=rate, met=not why, why=why, result=result))
            low, high = (low, rate) if why else (rate, high)
            if low == wanted.last_rate:
                ended = "--last-rate was met"
            elif low == 0:
                ended = "the first rate was not met"
            elif high / low <= 1 + wanted.tolerance:
                ended = f"known within {wanted.tolerance:.0%}"
            rate = min(2 * low, wanted.last_rate) if high == float("inf") else sqrt(low * high)
    finally:
        await chosen.close()
    return Found(
        rate=low or None,
        attainment=wanted.attainment,
        slos_ms={slo.metric: slo.limit * 1e3 for slo in run.goals.slos},
        config={name: getattr(run, name).given() for name in ("server", "load", "work", "goals")},
        interrupted=ended == "interrupted",
        ended=ended,
        probes=probes,
    )


def _prepared(run: Run) -> Run:
    load = run.load
    if not run.goals.slos:
        raise FlagError("--slo", None, "is required: what the rate is to meet")
    for name in ("rate", "concurrency", "ramp_from", "requests", "trace_speed"):
        if getattr(load, name) is not None:
            raise FlagError(
                "--" + name.replace("_", "-"),
                getattr(load, name),
                "cannot go with search, which sets the rate",
            )
    if run.work.trace is not None:
        # Its times are scaled to each rate, and its end is the probe's.
        duration = load.duration
    else:
        duration = load.duration or DEFAULT_DURATION
    # A rate that is too high leaves a long queue, which the next probe must not inherit.
    longest = max(slo.limit for slo in run.goals.slos)
    drain = min(run.server.timeout, 10 + 2 * longest) if load.drain is None else load.drain
    return run.model_copy(update={"load": load.model_copy(update={"duration": duration, "drain": drain})})


def _unmet(result: Result, attainment: float) -> str:
    """Why a run does not meet the objectives; empty where it does."""
    if result.goodput is None or not result.requests.ok:
        return "no request ended well"
    if result.goodput.share < attainment:
        each = ", ".join(f"{name} {share(met)}" for name, met in result.goodput.met.items())
        return f"{share(result.goodput.share)} of the requests met every objective ({each})"
    offered, achieved = result.offered_rate, result.achieved_rate
    if offered and achieved and achieved < KEPT_UP * offered:
        return f"{number(achieved)} of {number(offered)} requests/s ended"
    return ""


def show_search(found: Found, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("requests/s", "ttft p99 ms", "tpot p99 ms", "e2e p99 ms", "goodput", "met"):
        table.add_column(column, justify="left" if column == "met" else "right")
    for probe in sorted(found.probes, key=lambda probe: probe.rate):
        result = probe.result
        first, whole = result.ttft_from_schedule_ms, result.e2e_from_schedule_ms
        good = result.goodput.share if result.goodput else None
        tails = [figure.p99 if figure else None for figure in (first, result.tpot_ms, whole)]
        table.add_row(
            *map(number, (probe.rate, *tails)), share(good), "yes" if probe.met else f"no: {probe.why}"
        )
    console.print(table)
    slos = ", ".join(f"{name} <= {number(limit)} ms" for name, limit in found.slos_ms.items())
    best = "no rate" if found.rate is None else f"{number(found.rate)} requests/s"
    console.print(
        f"[bold]{best}[/] with {share(found.attainment)} of the requests within {slos} ({found.ended})"
    )
    for probe in found.probes:
        if not probe.met and probe.result.harness.bottleneck:
            reason = probe.result.harness.reasons[0]
            console.print(
                f"[red]At {number(probe.rate)} requests/s the harness was a bottleneck:[/] {reason}"
            )
