"""Two results side by side."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from loadtest.config import flag
from loadtest.histogram import Distribution
from loadtest.result import Result
from loadtest.table import METRICS, number

PERCENTILES = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class Difference:
    name: str
    a: float
    b: float
    better: int  # 1 where more is better, -1 where less is

    @property
    def ratio(self) -> float:
        return self.b / self.a if self.a else float("inf") if self.b else 1.0

    @property
    def regression(self) -> float:
        """By which share B is worse; negative where it is better."""
        return self.better * (1 - self.ratio)


def differences(a: Result, b: Result) -> list[Difference]:
    """Of the figures that both have."""
    rows = []
    for field in METRICS:
        first: Distribution | None = getattr(a, field)
        second: Distribution | None = getattr(b, field)
        if first is None or second is None:
            continue
        for column in PERCENTILES:
            before, after = getattr(first, column), getattr(second, column)
            if before is not None and after is not None:
                rows.append(Difference(f"{field.removesuffix('_ms')} {column} ms", before, after, -1))
    figures = {
        "output tokens/s": (a.output_tokens_per_s, b.output_tokens_per_s, 1),
        "requests/s": (a.achieved_rate, b.achieved_rate, 1),
        "goodput, share": (_attained(a), _attained(b), 1),
        "failed, share": (_failed(a), _failed(b), -1),
        "FLOPs saved, share": (a.flops_saved, b.flops_saved, 1),
    }
    for name, (before, after, better) in figures.items():
        if before is not None and after is not None:
            rows.append(Difference(name, before, after, better))
    return rows


def _attained(result: Result) -> float | None:
    return result.goodput.share if result.goodput else None


def _failed(result: Result) -> float:
    return result.requests.failed / max(1, result.requests.ok + result.requests.failed)


def show_comparison(rows: list[Difference], a: Result, b: Result, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("figure")
    for column in ("A", "B", "B / A"):
        table.add_column(column, justify="right")
    for row in rows:
        colour = "red" if row.regression > 0.05 else "green" if row.regression < -0.05 else "default"
        table.add_row(row.name, number(row.a), number(row.b), f"[{colour}]{row.ratio:.3f}[/]")
    console.print(table)
    for line in _unequal(a, b):
        console.print(f"[yellow]{line}[/]")


def _unequal(a: Result, b: Result) -> list[str]:
    """What else differs between the runs, and may be why the figures do."""
    lines = []
    for group in sorted(a.config.keys() | b.config.keys()):
        first, second = a.config.get(group, {}), b.config.get(group, {})
        differing = [n for n in sorted(first.keys() | second.keys()) if first.get(n) != second.get(n)]
        lines += [f"{flag(name)}: A {first.get(name)}, B {second.get(name)}" for name in differing]
    if a.model != b.model:
        differing = [name for name in a.model if a.model[name] != b.model.get(name)]
        lines.append(f"the model differs in {', '.join(differing)}")
    for name, result in (("A", a), ("B", b)):
        lines += [f"{name}: {reason}" for reason in result.harness.reasons]
    return lines
