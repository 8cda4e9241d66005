"""``fathom bench depth`` on a tiny model: the three ways agree, and the ideal is the issue's formula."""

from pathlib import Path

import numpy as np
import pytest

from models.load import load
from serving.bench import depth as bench
from serving.engine.depth import DepthPolicy
from tests import tiny


def test_the_three_ways_give_the_same_tokens(tmp_path: Path) -> None:
    model = load(tiny.checkpoint(tmp_path, tiny.LOOPED, text=False), dtype="float32").model
    exits = bench.Exits("medium", (DepthPolicy.gate(0.5),), stays=0.5)
    [row] = bench.measure(model, "tiny", [exits], 4, [[1, 2], [3], [4, 5, 6]])
    assert row["tokens_identical"] and 1 < row["mean_depth"] < 3
    assert row["ratio_vs_full"] / row["ideal"] == pytest.approx(row["share_of_ideal"], abs=2e-3)


def test_the_ideal_is_the_ratio_of_full_batches(tmp_path: Path) -> None:
    model = load(tiny.checkpoint(tmp_path, tiny.LOOPED, text=False), dtype="float32").model
    p, c, q, D, d = 2.0, 5.0, 3.0, 3, 1.5
    assert bench.ideal(model, {0: [p], 1: [c], 2: [q]}, d) == pytest.approx((p + D * c + q) / (p + d * c + q))


def test_a_trace_has_the_shares_that_were_asked_for() -> None:
    trace = bench.trace_of(64, 500, 4, stays=0.6)
    shares = [float(np.mean(trace > depth)) for depth in range(4)]
    assert shares == pytest.approx([1, 0.6, 0.36, 0.216], abs=0.02)
    assert (bench.trace_of(3, 9, 4, stays=1.0) == 4).all()
