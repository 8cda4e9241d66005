"""Arrival times keep their rate, their process and their profile."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import Process, Profile, arrivals

rates = st.floats(0.01, 1e4)
MANY = 40_000


def drawn(
    profile: Profile, process: Process = "poisson", burstiness: float = 1.0, seed: int = 0
) -> np.ndarray:
    return np.array(list(islice(arrivals(profile, process, burstiness, np.random.default_rng(seed)), MANY)))


@given(first=rates, last=rates, duration=st.floats(0.1, 1e4), steps=st.none() | st.integers(1, 9))
def test_times_invert_the_cumulative_rate(
    first: float, last: float, duration: float, steps: int | None
) -> None:
    profile = Profile.ramp(first, last, duration, steps)
    expected = np.linspace(0, 1.5 * duration * max(first, last), 200)
    times = profile.times(expected)
    assert (np.diff(times) >= 0).all()
    np.testing.assert_allclose([_area(profile, t) for t in times], expected, rtol=1e-6, atol=1e-6)


def _area(profile: Profile, until: float) -> float:
    """Requests expected until a time, by the definition."""
    ends = [*(t for t, _ in profile.points[1:]), np.inf]
    total = 0.0
    for (start, rate), end, i in zip(profile.points, ends, range(len(ends)), strict=True):
        width = min(until, end) - start
        if width <= 0:
            break
        slope = 0.0 if profile.steps or end == np.inf else (profile.points[i + 1][1] - rate) / (end - start)
        total += rate * width + slope * width**2 / 2
    return total


@pytest.mark.parametrize(
    ("process", "burstiness", "cv"), [("poisson", 1, 1), ("gamma", 0.25, 2), ("constant", 1, 0)]
)
def test_gaps_have_their_mean_and_variation(process: Process, burstiness: float, cv: float) -> None:
    gaps = np.diff(drawn(Profile.flat(50.0), process, burstiness))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.06)


def test_a_ramp_sends_as_many_as_its_area() -> None:
    times = drawn(Profile.ramp(0.0, 400.0, 60.0))
    assert (times < 60).sum() == pytest.approx(12_000, rel=0.03)
    assert (times < 30).sum() == pytest.approx(3_000, rel=0.06)


def test_the_seed_alone_decides() -> None:
    profile = Profile.flat(10.0)
    assert (drawn(profile, seed=3) == drawn(profile, seed=3)).all()
    assert (drawn(profile, seed=3) != drawn(profile, seed=4)).all()
