"""What a person reads at the end of a run."""

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table

from loadtest.histogram import Distribution
from loadtest.result import Result

METRICS = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "itl_ms": "inter-token latency",
    "e2e_ms": "end to end",
    "ttft_from_schedule_ms": "first token, from schedule",
    "e2e_from_schedule_ms": "end to end, from schedule",
    "message_gap_ms": "between messages",
}
COLUMNS = ("mean", "p50", "p90", "p99", "max")


def show(result: Result, console: Console) -> None:
    console.print(Group(*_parts(result)))


def _parts(result: Result) -> Iterable[RenderableType]:
    yield _latencies(result)
    yield _facts(result)
    for title, groups in (("depth policy", result.policies), ("turn", result.turns)):
        if groups:
            table = _table(
                title,
                "requests",
                "failed",
                "ttft p50 ms",
                "ttft p99 ms",
                "tpot p50 ms",
                "mean depth",
                "cached",
            )
            for name, group in groups.items():
                cells = (group.ttft_ms.p50, group.ttft_ms.p99, group.tpot_ms.p50, group.mean_depth)
                cached = share(group.cached_share)
                table.add_row(name, str(group.requests), str(group.failed), *map(number, cells), cached)
            yield table
    for reason in result.harness.reasons:
        yield f"[bold red]The harness was a bottleneck:[/] {reason}"
    if result.lengths.short:
        yield f"[yellow]{result.lengths.short} requests ended with fewer tokens than asked for[/]"
    if result.interrupted:
        yield "[yellow]Interrupted: these are the figures up to then[/]"


def _latencies(result: Result) -> Table:
    table = _table("milliseconds", *COLUMNS)
    for field, title in METRICS.items():
        distribution: Distribution | None = getattr(result, field)
        same = field == "message_gap_ms" and distribution == result.itl_ms
        if distribution is not None and distribution.count and not same:
            table.add_row(title, *(number(getattr(distribution, column)) for column in COLUMNS))
    return table


def _facts(result: Result) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    requests = result.requests
    counted = f"{requests.ok} ok, {requests.failed} failed"
    counted += f", {requests.warmup} in warm-up" if requests.warmup else ""
    counted += f", {requests.unfinished} given up" if requests.unfinished else ""
    table.add_row("requests", f"{counted}, in {number(result.duration_s)} s")
    for status, count in result.failures.items():
        table.add_row(f"  {status}", f"{count}  {result.failure_details[status][:200]}".rstrip())
    table.add_row("output tokens/s", number(result.output_tokens_per_s))
    if result.input_tokens_per_s:
        table.add_row("input tokens/s", number(result.input_tokens_per_s))
    table.add_row("requests/s", _rates(result))
    if result.steady:
        rate, tokens = result.steady.requests_per_s, result.steady.output_tokens_per_s
        table.add_row("steady state", f"{number(rate)} requests/s, {number(tokens)} output tokens/s")
    if result.goodput:
        slos = ", ".join(
            f"{name} <= {number(limit)} ms: {share(result.goodput.met[name])}"
            for name, limit in result.goodput.slos_ms.items()
        )
        good_rate = number(result.goodput.requests_per_s)
        good = f"{good_rate} requests/s, {share(result.goodput.share)} of them ({slos})"
        table.add_row("goodput", good)
    if result.mean_depth is not None:
        table.add_row(
            "mean depth", f"{number(result.mean_depth)}, {share(result.flops_saved)} of FLOPs saved"
        )
    if result.cached_share:
        table.add_row("prompt tokens cached", share(result.cached_share))
    harness = result.harness
    lag, starved = number(harness.loop_lag_ms.p99), share(harness.starved_share)
    table.add_row(
        "harness", f"{share(harness.cpu_share)} of a core, loop lag p99 {lag} ms, {starved} without a core"
    )
    return table


def _rates(result: Result) -> str:
    if result.offered_rate is None:
        return number(result.achieved_rate)
    sent = f"{number(result.sent_rate)} sent"
    return f"{number(result.offered_rate)} offered, {sent}, {number(result.achieved_rate)} achieved"


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def number(value: float | None) -> str:
    """Four significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
