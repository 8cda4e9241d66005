"""How right the harness is on this machine: it measures a server whose delays are known."""

import asyncio
import json
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from loadtest.config import Goals, Load, Run, Server, Work
from loadtest.errors import LoadTestError
from loadtest.result import Result
from loadtest.run import measure
from loadtest.table import number


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    known: float
    measured: float

    @property
    def error(self) -> float:
        """As a share of what is known."""
        return self.measured / self.known - 1


@dataclass(frozen=True, slots=True)
class Calibration:
    figures: tuple[Figure, ...]
    late_ms: dict[str, float]  # by which the server itself missed its delays
    result: Result


async def calibrated(
    rate: float, duration: float, max_tokens: int, ttft_ms: float, itl_ms: float
) -> Calibration:
    """In a process of its own the server takes nothing from the harness but a core."""
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.fake", "--port", "0",
        "--ttft-ms", str(ttft_ms), "--itl-ms", str(itl_ms),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout
        line = await server.stdout.readline()
        if not line:
            raise LoadTestError("the server with known delays did not start")
        run = Run(
            server=Server.read({"target": json.loads(line)["listening"]}),
            load=Load.read({"rate": rate, "duration": duration, "warmup": min(1.0, duration / 4)}),
            work=Work.read({"max_tokens": max_tokens}),
            goals=Goals.read({}),
        )
        result = await measure(run)
        server.terminate()
        report = json.loads(await server.stdout.readline())
    finally:
        if server.returncode is None:
            server.kill()
        await server.wait()
    if not result.requests.ok:
        raise LoadTestError(f"no request ended well: {result.failures}")
    return Calibration(_figures(result, max_tokens, ttft_ms, itl_ms), report["late_ms"], result)


def _figures(result: Result, max_tokens: int, ttft_ms: float, itl_ms: float) -> tuple[Figure, ...]:
    known = {"ttft_ms": ttft_ms, "e2e_ms": ttft_ms + (max_tokens - 1) * itl_ms}
    if max_tokens > 1:
        known |= {"tpot_ms": itl_ms, "itl_ms": itl_ms}
    figures = []
    for name, value in known.items():
        for column in ("mean", "p50", "p90", "p99"):
            measured = getattr(getattr(result, name), column)
            figures.append(Figure(f"{name.removesuffix('_ms')} {column}", value, measured))
    assert result.offered_rate and result.achieved_rate
    return (*figures, Figure("requests/s", result.offered_rate, result.achieved_rate))


def show_calibration(found: Calibration, limit: float, console: Console) -> bool:
    """Whether means, medians and rate are within the limit. The tails hold the server's own jitter, and are
    only shown."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("figure")
    for column in ("known", "measured", "error"):
        table.add_column(column, justify="right")
    right = True
    for figure in found.figures:
        judged = not figure.name.endswith(("p90", "p99"))
        wrong = judged and abs(figure.error) > limit
        right = right and not wrong
        error = f"[red]{figure.error:+.2%}[/]" if wrong else f"{figure.error:+.2%}"
        table.add_row(figure.name, number(figure.known), number(figure.measured), error)
    console.print(table)
    late = ", ".join(f"{name} {number(value)}" for name, value in found.late_ms.items())
    console.print(f"the server itself was late by (ms): {late}")
    for reason in found.result.harness.reasons:
        console.print(f"[bold red]The harness was a bottleneck:[/] {reason}")
    return right
