"""Distributions of times as HDR histograms of nanoseconds: three significant digits, from 1 ns to a day."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LONGEST = 86_400 * 10**9  # ns
_DIGITS = 3
_SIGNIFICANT_BITS = 11  # that three digits take in an HDR histogram


class Distribution(BaseModel):
    """Milliseconds. Percentiles are within 0.1 % of the sample's; count, mean, min and max are its own."""

    model_config = ConfigDict(frozen=True)

    count: int
    mean: float | None = None
    min: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None
    hdr: str | None = None  # HdrHistogram V2, compressed, base64: of nanoseconds

    @classmethod
    def of(cls, seconds: Floats, weights: Ints | None = None) -> Distribution:
        """Of times in seconds, each counted `weights` times."""
        weights = np.ones(len(seconds), np.int64) if weights is None else weights
        seconds, weights = seconds[weights > 0], weights[weights > 0]
        count = int(weights.sum())
        if not count:
            return cls(count=0)
        buckets, counts = _buckets(seconds, weights)
        low, high = float(seconds.min()) * 1e3, float(seconds.max()) * 1e3
        return cls(
            count=count,
            mean=float(seconds @ weights) / count * 1e3,
            min=low,
            max=high,
            hdr=_encoded(buckets, counts),
            **_percentiles(buckets, counts, low, high),
        )

    def curve(self) -> tuple[Floats, Floats]:
        """Milliseconds, and the share of values up to each."""
        if self.hdr is None:
            return np.zeros(0), np.zeros(0)
        histogram = HdrHistogram.decode(self.hdr)
        steps = [
            (item.value_iterated_to / 1e6, item.total_count_to_this_value)
            for item in histogram.get_recorded_iterator()
        ]
        values, totals = np.array([(steps[0][0], 0), *steps], dtype=np.float64).T
        return values, totals / self.count


_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}


def _buckets(seconds: Floats, weights: Ints) -> tuple[Ints, Ints]:
    """The lowest value, in ns, of every bucket of an HDR histogram that has any, and how many it has."""
    values = np.clip(np.rint(seconds * 1e9), 0, _LONGEST).astype(np.int64)
    shift = _shift(values)
    buckets, where = np.unique((values >> shift) << shift, return_inverse=True)
    return buckets, np.bincount(where, weights).astype(np.int64)


def _shift(values: Ints) -> Ints:
    """Bits below those that three digits take."""
    _, bits = np.frexp(values.astype(np.float64))
    return np.maximum(0, bits - _SIGNIFICANT_BITS).astype(np.int64)


def _percentiles(buckets: Ints, counts: Ints, low: float, high: float) -> dict[str, float]:
    """The middle of the bucket in which each falls, or the smallest or largest value if that is nearer."""
    totals = counts.cumsum()
    ranks = np.ceil(np.array(list(_PERCENTILES.values())) * totals[-1] - 1e-9)
    found = buckets[np.searchsorted(totals, ranks)]
    middles = (found + ((1 << _shift(found)) >> 1)) / 1e6
    return dict(zip(_PERCENTILES, np.clip(middles, low, high).tolist(), strict=True))


def _encoded(buckets: Ints, counts: Ints) -> str:
    """Recording and searching are slow in Python, so one call a bucket is all that the library does."""
    histogram = HdrHistogram(1, _LONGEST, _DIGITS)
    for value, count in zip(buckets.tolist(), counts.tolist(), strict=True):
        histogram.record_value(value, count)
    encoded: str = histogram.encode().decode()
    return encoded
