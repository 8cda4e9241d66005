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
    np.testing.assert_allclose([profile.expected(t) for t in times], expected, rtol=1e-6, atol=1e-6)


@given(rate=rates, duration=st.floats(0.1, 100), process=st.sampled_from(["poisson", "gamma", "constant"]))
def test_a_known_total_comes_exactly_and_in_time(rate: float, duration: float, process: Process) -> None:
    total = min(rate * duration, 2000.0)
    times = list(arrivals(Profile.flat(rate), process, 0.5, np.random.default_rng(0), total))
    assert len(times) == max(1, round(total))
    assert times == sorted(times) and times[0] > 0 and times[-1] < total / rate + 0.5 / rate


def test_conditioned_on_their_count_gaps_keep_their_character() -> None:
    for process, cv in (("poisson", 1.0), ("gamma", 2.0)):
        times = list(arrivals(Profile.flat(1.0), process, 0.25, np.random.default_rng(0), 20_000.0))
        gaps = np.diff(times)
        assert gaps.mean() == pytest.approx(1.0, rel=1e-3)
        assert gaps.std() == pytest.approx(cv, rel=0.05)
        assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03  # each is drawn anew


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
