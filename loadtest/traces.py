"""How long prompts and continuations are: fixed, replayed from a trace, or drawn like a published one; and
scaled to a model."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.errors import FlagError

MOONCAKE_BLOCK = 512  # tokens that one of its hash ids stands for
_SAMPLE = 4096  # draws that a synthetic trace is scaled by


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    at: float  # seconds after the first
    input: int
    output: int
    blocks: tuple[int, ...] = ()  # names of the prompt's blocks; prompts with equal names begin alike


@dataclass(frozen=True, slots=True)
class Published:
    """Lognormal lengths (mu, sigma of the logarithm; input and output are uncorrelated) and the coefficient
    of variation of the gaps."""

    input: tuple[float, float]
    output: tuple[float, float]
    gap_cv: float

    @property
    def burstiness(self) -> float:
        """Shape of Gamma gaps with that variation."""
        return self.gap_cv**-2

    def draw(self, rng: np.random.Generator) -> Iterator[Row]:
        """Without end, all at time 0."""
        while True:
            inputs = rng.lognormal(*self.input, _SAMPLE)
            outputs = rng.lognormal(*self.output, _SAMPLE)
            for i, o in zip(inputs.tolist(), outputs.tolist(), strict=True):
                yield Row(0.0, max(1, round(i)), max(1, round(o)))


# Fitted to the traces that Azure (AzurePublicDataset, 2023) and Mooncake (FAST 2025) published.
PUBLISHED = {
    "azure-conv": Published((6.63, 0.99), (5.02, 0.86), 1.09),
    "azure-code": Published((7.00, 1.36), (2.79, 0.85), 13.2),
    "mooncake-conv": Published((8.74, 1.20), (5.34, 1.36), 3.0),
}


def read_trace(path: Path) -> list[Row]:
    """Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's JSON lines (timestamp in ms,
    input_length, output_length, hash_ids). Raises FlagError naming the line that cannot be read."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise FlagError("--trace", path, f"cannot be read: {reason}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise FlagError("--trace", path, "is empty")
    rows = _mooncake(path, lines) if lines[0].lstrip().startswith("{") else _azure(path, lines)
    if not rows:
        raise FlagError("--trace", path, "has no requests")
    rows.sort(key=lambda row: row.at)
    return [replace(row, at=row.at - rows[0].at) for row in rows]


def _azure(path: Path, lines: Sequence[str]) -> list[Row]:
    columns = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
    reader = csv.DictReader(lines)
    if not columns <= set(reader.fieldnames or ()):
        raise FlagError(
            "--trace", path, f"line 1: must be JSON, or a header with {', '.join(sorted(columns))}"
        )
    rows = []
    for record in reader:
        try:
            at = datetime.fromisoformat(record["TIMESTAMP"]).timestamp()
            rows.append(_row(at, record["ContextTokens"], record["GeneratedTokens"]))
        except (ValueError, TypeError) as error:
            raise FlagError("--trace", path, f"line {reader.line_num}: {error}") from None
    return rows


def _mooncake(path: Path, lines: Sequence[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            at = float(record["timestamp"]) / 1000
            blocks = tuple(int(block) for block in record.get("hash_ids", ()))
            rows.append(_row(at, record["input_length"], record["output_length"], blocks))
        except KeyError as error:
            raise FlagError("--trace", path, f"line {number}: no field {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise FlagError("--trace", path, f"line {number}: {error}") from None
    return rows


def _row(at: float, given: Any, generated: Any, blocks: tuple[int, ...] = ()) -> Row:
    lengths = int(given), int(generated)
    if min(lengths) < 0:
        raise ValueError(f"a length is negative: {lengths}")
    # Traces have requests that were cut off before their first token; a request here asks for one at least.
    return Row(at, max(1, lengths[0]), max(1, lengths[1]), blocks)


@dataclass(slots=True)
class Scale:
    """Lengths made to fit a model: each times `factor`, and what is still too long cut in proportion."""

    factor: float
    limit: int  # prompt and continuation together; 0 for none
    output_limit: int | None = None
    clipped: int = 0  # requests so far

    @classmethod
    def of(cls, setting: str, sample: Iterable[Row], limit: int, output_limit: int | None) -> "Scale":
        """`auto` fits the 99th percentile of the sample's total lengths into the limit, and never stretches:
        by the longest alone, one outlier would shrink every request."""
        factor = 1.0
        if setting != "auto":
            factor = float(setting)
        elif limit:
            p99 = float(np.percentile([row.input + row.output for row in sample], 99))
            factor = min(1.0, limit / p99)
        return cls(factor, limit, output_limit)

    @property
    def block(self) -> int:
        """Tokens of a scaled block of Mooncake's."""
        return max(1, round(MOONCAKE_BLOCK * self.factor))

    def apply(self, row: Row) -> Row:
        given, generated = max(1, round(row.input * self.factor)), max(1, round(row.output * self.factor))
        if self.output_limit:
            generated = min(generated, self.output_limit)
        if self.limit and given + generated > self.limit:
            self.clipped += 1
            shrink = self.limit / (given + generated)
            generated = max(1, int(generated * shrink))
            given = max(1, min(int(given * shrink), self.limit - generated))
        return replace(row, input=given, output=generated, blocks=row.blocks[: ceil(given / self.block)])
