"""From cases to rows of a table: agreement first, then time."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from kernels.bench.case import SAMPLE, TOLERANCE, Case, Trial

UNITS = (64, 256, 1024, 4096, 8192, 16384, 32768)  # batch x heads


class Clock(Protocol):
    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, the median of many; it may have side effects, and nothing of its inputs is in a
        cache."""


@dataclass(frozen=True, slots=True)
class Row:
    case: str
    units: int
    error: float  # the largest difference, relative to the largest expected number
    microseconds: float | None = None
    share_of_copy: float | None = None  # of the bandwidth of a copy
    over_fla: float | None = None  # how many times as fast; None: not installed, or it failed
    over_compiled: float | None = None
    tolerance: float = TOLERANCE

    @property
    def agrees(self) -> bool:
        return self.error <= self.tolerance


def check(trial: Trial) -> float:
    """The first step's difference from the naive recurrence; NaN counts as infinite."""
    got = trial.step()[:SAMPLE].float()
    difference = (got - trial.expected).abs().max() / trial.expected.abs().max()
    return float(difference.nan_to_num(float("inf")))


def measure(case: Case, units: int, trial: Trial, copy_bytes_per_second: float, clock: Clock) -> Row:
    """A case that does not agree gets no time: there is nothing to say about the speed of a wrong kernel."""
    error = check(trial)
    if not error <= trial.tolerance:
        return Row(case.name, units, error, tolerance=trial.tolerance)
    mine = clock.seconds(trial.step)

    def against(other: Callable[[], Any] | None) -> float | None:
        if other is None:
            return None
        try:
            return clock.seconds(other) / mine
        except Exception as failure:  # another's kernel: whatever it does, it is not ours to fall over
            print(f"{case.name}: not compared: {type(failure).__name__}: {str(failure)[:200]}")
            return None

    compiled = None if trial.torch_step is None else torch.compile(trial.torch_step, dynamic=True)
    return Row(
        case.name, units, error, 1e6 * mine, trial.bytes / mine / copy_bytes_per_second, against(trial.fla),
        against(compiled), trial.tolerance,
    )  # fmt: skip


def copy_bandwidth(clock: Clock, device: torch.device, size: int = 1 << 32) -> float:
    """Bytes a second, read and written, of a kernel that reads so many bytes and writes as many. (In a captured graph,
    `copy_` becomes a node of the copy engine, which on an H200 moves two thirds of what kernels do.)"""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / clock.seconds(lambda: torch.neg(source, out=target))


class DeviceClock:
    """CUDA events around replays of a captured graph, so that no launch is waited for; Triton's `do_bench`
    clears the L2 cache before each."""

    def seconds(self, call: Callable[[], Any]) -> float:
        from triton.testing import do_bench

        for _ in range(3):  # compiles, tunes, allocates
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        median: float = do_bench(graph.replay, warmup=10, rep=50, return_mode="median")
        return median / 1e3


HEAD = f"{'case':24}{'units':>7}{'us':>10}{'of copy':>9}{'x fla':>8}{'x compiled':>12}  error"


def line(row: Row) -> str:
    """A row of the table below HEAD."""
    cells = (row.microseconds, row.share_of_copy, row.over_fla, row.over_compiled)
    texts = [
        "-" if x is None else f"{x:{form}}"
        for x, form in zip(cells, (".1f", ".0%", ".2f", ".2f"), strict=True)
    ]
    note = "" if row.agrees else "  DISAGREES: not timed"
    figures = f"{texts[0]:>10}{texts[1]:>9}{texts[2]:>8}{texts[3]:>12}"
    return f"{row.case:24}{row.units:7}{figures}  {row.error:.0e}{note}"


def as_json(rows: Sequence[Row], device: str | None, copy_bytes_per_second: float | None) -> dict[str, Any]:
    return {
        "device": device,
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_bytes_per_second,
        "agrees": all(row.agrees for row in rows),
        "rows": [asdict(row) for row in rows],
    }


__all__ = [
    "HEAD",
    "UNITS",
    "Clock",
    "DeviceClock",
    "Row",
    "as_json",
    "check",
    "copy_bandwidth",
    "line",
    "measure",
]
