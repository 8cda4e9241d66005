"""Distributions of times as HDR histograms of nanoseconds: three significant digits, from 1 ns to a day."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict

Floats = npt.NDArray[np.float64]

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
    def of(cls, seconds: Floats, weights: npt.NDArray[np.int64] | None = None) -> Distribution:
        """Of times in seconds, each counted `weights` times."""
        weights = np.ones(len(seconds), np.int64) if weights is None else weights
        seconds, weights = seconds[weights > 0], weights[weights > 0]
        count = int(weights.sum())
        if not count:
            return cls(count=0)
        histogram = _histogram(seconds, weights)
        at = {name: histogram.get_value_at_percentile(p) / 1e6 for name, p in _PERCENTILES.items()}
        low, high = float(seconds.min()) * 1e3, float(seconds.max()) * 1e3
        return cls(
            count=count,
            mean=float(seconds @ weights) / count * 1e3,
            min=low,
            max=high,
            hdr=histogram.encode().decode(),
            # A bucket's edge may lie beyond the largest or smallest value in it.
            **{name: min(max(value, low), high) for name, value in at.items()},
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
        values, totals = np.array(steps, dtype=np.float64).T
        return values, totals / self.count


_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


def _histogram(seconds: Floats, weights: npt.NDArray[np.int64]) -> HdrHistogram:
    """Rounds to the histogram's buckets first: recording is Python, and there may be millions of values."""
    values = np.clip(np.rint(seconds * 1e9), 0, _LONGEST).astype(np.int64)
    _, bits = np.frexp(values.astype(np.float64))
    shift = np.maximum(0, bits - _SIGNIFICANT_BITS)
    buckets, where = np.unique((values >> shift) << shift, return_inverse=True)
    histogram = HdrHistogram(1, _LONGEST, _DIGITS)
    for value, count in zip(
        buckets.tolist(), np.bincount(where, weights).astype(np.int64).tolist(), strict=True
    ):
        histogram.record_value(value, count)
    return histogram
