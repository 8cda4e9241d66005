"""The figures: what a known server gives in virtual time, and the laws between them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.analysis import Times, gaps, timeline
from loadtest.compare import differences
from loadtest.core import Sample
from loadtest.errors import LoadTestError
from loadtest.histogram import Distribution
from loadtest.recorder import Columns, Recorder
from loadtest.result import Result
from loadtest.transports.openai import spread
from tests.loadtest.virtual import result_of


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=60))
def test_percentiles_are_within_a_thousandth(seconds: list[float]) -> None:
    found = Distribution.of(np.array(seconds))
    assert found.count == len(seconds)
    assert found.mean == pytest.approx(np.mean(seconds) * 1e3)
    assert (found.min, found.max) == pytest.approx((min(seconds) * 1e3, max(seconds) * 1e3))
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        exact = np.percentile(seconds, percent, method="inverted_cdf") * 1e3
        assert getattr(found, name) == pytest.approx(exact, rel=1e-3)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 5)), min_size=1, max_size=30))
def test_weights_count_a_value_as_often(pairs: list[tuple[float, int]]) -> None:
    values, weights = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs])
    weighted, repeated = Distribution.of(values, weights), Distribution.of(np.repeat(values, weights))
    assert weighted.model_dump(exclude={"mean"}) == repeated.model_dump(exclude={"mean"})
    assert weighted.mean == pytest.approx(repeated.mean)


def test_a_distribution_travels_in_its_histogram() -> None:
    values = np.random.default_rng(0).lognormal(-4, 1, 5000)
    milliseconds, shares = Distribution.of(values).curve()
    assert shares[0] == 0 and shares[-1] == 1 and (np.diff(shares) >= 0).all()
    exact = [(values * 1e3 <= value * 1.001).mean() for value in milliseconds]
    np.testing.assert_allclose(shares[1:], exact[1:], atol=0.02)


messages = st.lists(st.tuples(st.floats(0.001, 2), st.integers(1, 6)), min_size=1, max_size=12)
requests = st.lists(
    st.tuples(st.floats(0, 5), messages, st.sampled_from(["OK", "OK", "INTERNAL"])), max_size=8
)


def recorded(drawn: list[Any]) -> tuple[list[Sample], Columns]:
    recorder, samples = Recorder(), []
    for begin, steps, status in drawn:
        sample = Sample(begin, 3, sent=begin)
        stamps = begin + np.cumsum([gap for gap, _ in steps])
        for stamp, (_, count) in zip(stamps.tolist(), steps, strict=True):
            sample.arrived(stamp, count)
        sample.finish(sample.stamps[-1] + 0.5, status)
        recorder.add(sample)
        samples.append(sample)
    return samples, recorder.columns()


@given(requests)
def test_token_times_add_up(drawn: list[Any]) -> None:
    """ITL has one gap fewer than tokens, and their sum is the time from the first to the last."""
    samples, columns = recorded(drawn)
    done, well = columns.where(columns.ok), [s for s in samples if s.status == "OK"]
    times = Times.of(done)
    itl, message_gap = gaps(done)
    assert itl.count == sum(sum(s.counts) - 1 for s in well)
    assert message_gap.count == sum(len(s.counts) - 1 for s in well)
    between = sum(s.stamps[-1] - s.stamps[0] for s in well)
    for figure in (itl, message_gap):
        if figure.count:
            assert figure.mean is not None
            assert figure.mean * figure.count == pytest.approx(between * 1e3, rel=1e-6, abs=1e-6)
    assert times.ttft.tolist() == [s.stamps[0] - s.sent for s in well]
    assert times.tpot.tolist() == pytest.approx(
        [(s.stamps[-1] - s.stamps[0]) / (sum(s.counts) - 1) for s in well if sum(s.counts) > 1]
    )
    latency = times.e2e[times.tokens > 1]
    assert times.tpot == pytest.approx(
        (latency - times.ttft[times.tokens > 1]) / (times.tokens[times.tokens > 1] - 1)
    )


@given(requests)
def test_the_timeline_loses_nothing(drawn: list[Any]) -> None:
    samples, columns = recorded(drawn)
    stop = max([s.end for s in samples], default=1.0)
    line = timeline(columns, 0.0, stop)
    assert sum(line.offered) == sum(line.sent) == sum(line.ok) + sum(line.failed) == len(samples)
    assert sum(line.output_tokens) == sum(sum(s.counts) for s in samples)
    assert line.in_flight[-1] == 0 and min(line.in_flight) >= 0


@given(st.integers(1, 500), st.integers(1, 50))
def test_a_total_spreads_over_messages(total: int, messages: int) -> None:
    counts = spread(total, messages)
    assert sum(counts) == total and len(counts) == messages
    assert counts[0] == max(counts) and max(counts) - min(counts) <= 1


# -- a known server, in virtual time -------------------------------------------------------------------------


def test_the_figures_of_a_closed_loop() -> None:
    result = result_of(concurrency=64, requests=256, max_tokens=64, server={"ttft": 0.05, "itl": 0.005})
    latency = 50 + 63 * 5  # milliseconds
    for figure, known in (
        (result.ttft_ms, 50),
        (result.tpot_ms, 5),
        (result.itl_ms, 5),
        (result.e2e_ms, latency),
    ):
        assert (figure.mean, figure.p50, figure.p90, figure.p99) == pytest.approx((known,) * 4, rel=1e-3)
    assert result.duration_s == pytest.approx(4 * latency / 1e3)
    assert result.output_tokens_per_s == pytest.approx(256 * 64 / result.duration_s)
    assert result.achieved_rate == pytest.approx(256 / result.duration_s)
    assert (result.offered_rate, result.ttft_from_schedule_ms, result.failures) == (None, None, {})
    assert result.steady is not None
    assert result.steady.output_tokens_per_s == pytest.approx(64 * 64 / (latency / 1e3), rel=0.02)


def test_the_figures_of_an_open_loop() -> None:
    result = result_of(rate=1000.0, duration=2.0, max_tokens=8, slo=("ttft=60ms",))
    assert result.ttft_from_schedule_ms is not None and result.goodput is not None
    assert result.ttft_from_schedule_ms.p99 == pytest.approx(50, rel=1e-3)
    assert result.offered_rate == pytest.approx(result.achieved_rate) == pytest.approx(1000, rel=0.05)
    assert result.goodput.share == 1 and result.goodput.requests_per_s == pytest.approx(result.achieved_rate)


def test_a_server_that_cannot_keep_up_shows_in_every_figure_from_the_schedule() -> None:
    """20 slots, 85 ms each: 235 requests/s at most."""
    result = result_of(
        rate=500.0, arrival="constant", duration=4.0, max_tokens=8, server={"slots": 20}, slo=("ttft=200ms",)
    )
    assert result.offered_rate == pytest.approx(500, rel=0.01)
    assert result.achieved_rate == pytest.approx(20 / 0.085, rel=0.02)
    # After t seconds the queue is (1 - 235/500) t long; a request waits until it is served.
    assert result.ttft_from_schedule_ms is not None
    assert result.ttft_from_schedule_ms.max == pytest.approx(4000 * (500 / (20 / 0.085) - 1) + 50, rel=0.03)
    assert result.goodput is not None
    # They are served 20 at a time, and each 20 wait 45 ms longer: 85 ms less the 40 ms in which 20 arrive.
    assert result.goodput.share == pytest.approx(4 * 20 / result.requests.ok)


def test_warm_up_counts_nowhere() -> None:
    slow_start = result_of(
        concurrency=2, duration=2.0, warmup=1.0, max_tokens=2, fail=lambda number: number < 5
    )
    assert slow_start.failures == {} and slow_start.requests.warmup > 5
    everything = result_of(concurrency=2, duration=2.0, max_tokens=2, fail=lambda number: number < 5)
    assert everything.failures == {"INTERNAL": 5} and everything.requests.warmup == 0
    assert everything.failure_details == {"INTERNAL": "asked to"}
    assert slow_start.requests.sent == everything.requests.sent


def test_goodput_counts_failures_and_the_strictest_objective() -> None:
    flags: dict[str, Any] = {"concurrency": 4, "requests": 40, "max_tokens": 11}
    result = result_of(**flags, slo=("ttft=60ms", "tpot=4ms"), fail=lambda number: number % 10 == 0)
    assert result.goodput is not None
    assert result.goodput.met == {"ttft": 0.9, "tpot": 0.0} and result.goodput.share == 0
    relaxed = result_of(
        **flags, slo=("ttft=60ms", "tpot=6ms", "e2e=1s"), fail=lambda number: number % 10 == 0
    )
    assert relaxed.goodput is not None and relaxed.goodput.share == 0.9


def test_groups_of_policies_and_turns() -> None:
    result = result_of(concurrency=3, requests=60, turns=2, depth=("full:0.5", "fixed=1:0.5"), max_tokens=2)
    assert sum(group.requests for group in result.policies.values()) == 60
    assert [group.requests for group in result.turns.values()] == [30, 30]


def test_one_token_has_no_time_between_tokens() -> None:
    result = result_of(concurrency=1, requests=3, max_tokens=1)
    assert (result.tpot_ms.count, result.itl_ms.count, result.ttft_ms.count) == (0, 0, 3)


def test_a_run_in_which_nothing_ends_well_still_has_a_result(tmp_path: Path) -> None:
    result = result_of(concurrency=2, requests=4, fail=lambda number: True, slo=("ttft=1s",))
    assert (result.requests.ok, result.requests.failed, result.failures) == (0, 4, {"INTERNAL": 4})
    assert result.goodput is not None and result.goodput.share == 0 and result.steady is None
    result.write(tmp_path / "r.json")
    assert Result.read(tmp_path / "r.json") == result


def test_results_are_written_and_read(tmp_path: Path) -> None:
    result = result_of(rate=50.0, requests=30, api_key="secret", header=("cookie=secret",))
    result.write(tmp_path / "r.json")
    assert Result.read(tmp_path / "r.json") == result
    text = (tmp_path / "r.json").read_text()
    assert text.startswith('{\n  "schema": "fathom.loadtest/1"') and "secret" not in text
    for content in ("", "{}", '{"schema": "fathom.loadtest/2"}', "[1]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(LoadTestError, match=r"bad\.json: is no result"):
            Result.read(tmp_path / "bad.json")
    with pytest.raises(LoadTestError, match="cannot be read"):
        Result.read(tmp_path / "none.json")


def test_a_comparison_says_what_is_worse() -> None:
    before = result_of(concurrency=4, requests=40, max_tokens=10)
    after = result_of(concurrency=4, requests=40, max_tokens=10, server={"itl": 0.01})
    rows = {row.name: row for row in differences(before, after)}
    assert rows["tpot p50 ms"].ratio == pytest.approx(2, rel=0.01)
    assert rows["tpot p50 ms"].regression == pytest.approx(1, rel=0.01)
    assert rows["output tokens/s"].regression == pytest.approx(1 - 95 / 140, rel=0.01)
    assert rows["ttft p99 ms"].regression == pytest.approx(0, abs=1e-6)
    assert all(row.regression == 0 for row in differences(before, before))
