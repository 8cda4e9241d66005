"""When the requests of an open loop are sent: a random process in operational time, mapped onto a rate
profile.

Gaps of mean one are drawn first, whatever the rate (Poisson: exponential; Gamma: shape `burstiness`, so that
the coefficient of variation is 1/sqrt(burstiness)). Their running sum is the number of requests expected so
far, and the inverse of the profile's cumulative rate turns it into seconds. A ramp thus keeps the character
of the process.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Process = Literal["poisson", "gamma", "constant"]
Floats = npt.NDArray[np.float64]
_CHUNK = 1024
_LARGE = 1 << 22  # requests whose times are drawn at once


@dataclass(frozen=True, slots=True)
class Profile:
    """A rate in requests/s over time: `points` are (seconds, rate), joined by lines, or held until the next
    where `steps`. The last rate goes on for ever."""

    points: tuple[tuple[float, float], ...]
    steps: bool = False

    @classmethod
    def flat(cls, rate: float) -> "Profile":
        return cls(((0.0, rate),))

    @classmethod
    def ramp(cls, first: float, last: float, duration: float, steps: int | None = None) -> "Profile":
        """From `first` to `last` within `duration`; in `steps` equal stairs, or as a line."""
        if steps is None:
            return cls(((0.0, first), (duration, last)))
        height = (last - first) / max(1, steps - 1)
        return cls(tuple((i * duration / steps, first + i * height) for i in range(steps)), steps=True)

    def times(self, expected: Floats) -> Floats:
        """Seconds at which the expected number of requests so far reaches each value."""
        starts = np.array([t for t, _ in self.points])
        rates = np.array([r for _, r in self.points])
        widths = np.diff(starts)
        areas = rates[:-1] * widths if self.steps else (rates[:-1] + rates[1:]) / 2 * widths
        before = np.concatenate([[0.0], np.cumsum(areas)])  # expected requests before each point
        at = np.searchsorted(before, expected, side="right") - 1
        slopes = np.append(np.zeros(len(widths)) if self.steps else np.diff(rates) / widths, 0.0)
        rest, rate, slope = expected - before[at], rates[at], slopes[at]
        # rest = rate t + slope t^2 / 2, solved without dividing by a slope that may be zero
        root = np.sqrt(np.maximum(rate**2 + 2 * slope * rest, 0.0))
        return starts[at] + np.divide(2 * rest, rate + root, out=np.zeros_like(rest), where=rate + root > 0)

    def expected(self, until: float) -> float:
        """Requests until a time in seconds."""
        total = 0.0
        for i, (start, rate) in enumerate(self.points):
            last = i == len(self.points) - 1
            width = until - start if last else min(until, self.points[i + 1][0]) - start
            if width <= 0:
                break
            level = last or self.steps
            slope = 0.0 if level else (self.points[i + 1][1] - rate) / (self.points[i + 1][0] - start)
            total += rate * width + slope * width**2 / 2
        return total


def arrivals(
    profile: Profile,
    process: Process,
    burstiness: float,
    rng: np.random.Generator,
    total: float | None = None,
) -> Iterator[float]:
    """Seconds since the start, one for each request.

    Where the `total` that is expected is known, there are exactly as many, and they fill the time in which
    they are expected: the process conditioned on its count. Else a thousand requests would come out at 968 to
    1032, and no two runs would be offered the same load. Without a total, or with one so large that it hardly
    matters, they come without end.
    """
    if total is not None and total < _LARGE:
        count = max(1, round(total))
        sums = np.cumsum(_gaps(process, burstiness, rng, count + 1))
        if process == "constant":
            yield from profile.times(sums[:-1] - 0.5).tolist()
        elif sums[-1] > 0:
            yield from profile.times(sums[:-1] * (total / sums[-1])).tolist()
        return
    expected = -0.5 if process == "constant" else 0.0
    while True:
        sums = expected + np.cumsum(_gaps(process, burstiness, rng, _CHUNK))
        expected = float(sums[-1])
        yield from profile.times(sums).tolist()


def _gaps(process: Process, burstiness: float, rng: np.random.Generator, count: int) -> Floats:
    if process == "poisson":
        return rng.exponential(1.0, count)
    if process == "gamma":
        return rng.gamma(burstiness, 1.0 / burstiness, count)
    return np.ones(count)
