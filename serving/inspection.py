"""How ``fathom inspect`` reads a budget and shows its report."""

import re

from rich.console import Console
from rich.table import Table

from models.inspection import Report
from serving.errors import InvalidArgumentError

UNITS = {
    "": 1,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def bytes_of(name: str, text: str) -> float:
    """``500MB`` or ``16GiB`` -> bytes. Raises InvalidArgumentError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise InvalidArgumentError(name, text, "must be a size like 500MB or 16GiB")
    return float(match[1]) * UNITS[match[2].lower()]


def as_text(size: float) -> str:
    """Bytes, or operations, to three digits."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.3g} "


def as_table(r: Report, console: Console | None = None) -> None:
    """Print a report for a person."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _rows(r):
        table.add_row(name, value)
    console = console or Console()
    console.print(f"[bold]{r.model}[/bold]")
    console.print(table)
    for warning in r.warnings:
        console.print(f"[yellow]odd:[/yellow] {warning}", soft_wrap=True, highlight=False)
    for problem in r.problems:
        console.print(f"[red]cannot be served:[/red] {problem}", soft_wrap=True, highlight=False)


def _rows(r: Report) -> list[tuple[str, str]]:
    rows = [] if r.family is None else [("family", r.family)]
    if r.parameters is not None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in r.mixers.items())
        rows += [
            ("parameters", f"{r.parameters:,}"),
            ("layers", f"{r.layers} ({kinds}), {r.hidden_size} wide, vocabulary of {r.vocab_size:,}"),
        ]
    if r.weights:
        rows.append(("weights", ", ".join(f"{as_text(size)}B {kind}" for kind, size in r.weights.items())))
    if r.tokenizer is not None:
        rows.append(("tokenizer", "yes" if r.tokenizer else "none: token ids only"))
    if r.flops_per_token is not None and r.state_bytes_per_sequence is not None:
        grows = (
            f", and {as_text(r.state_bytes_per_token)}B a token" if r.state_bytes_per_token else ", constant"
        )
        rows += [
            ("operations a token", f"{as_text(r.flops_per_token)}FLOP, depth {r.max_depth}"),
            ("state of a sequence", f"{as_text(r.state_bytes_per_sequence)}B{grows}"),
        ]
    if r.slots is not None:
        length = "" if r.tokens_per_sequence is None else f" of {r.tokens_per_sequence:,} tokens"
        rows.append(("sequences that fit", f"{r.slots:,}{length}"))
    if r.ignored:
        rows.append(("keys without meaning here", ", ".join(r.ignored)))
    return rows
