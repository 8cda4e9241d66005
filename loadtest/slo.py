"""Service level objectives, and which requests meet them."""

import re
from dataclasses import dataclass

from loadtest.errors import FlagError

METRICS = ("ttft", "tpot", "e2e")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """A request meets it where the metric is at most `limit` seconds."""

    metric: str
    limit: float


def parse_slo(text: str) -> Slo:
    """Raises FlagError."""
    match = re.fullmatch(rf"({'|'.join(METRICS)})=(\d+(?:\.\d+)?)(us|ms|s)", text.strip())
    if not match or float(match[2]) <= 0:
        raise FlagError(
            "--slo", text, "must be METRIC=TIME, METRIC one of ttft, tpot, e2e, TIME as 200ms or 1.5s"
        )
    return Slo(match[1], float(match[2]) * _UNITS[match[3]])
