"""What people are told of the metrics: statistics, their differences, and the terminal's frame of them."""

from io import StringIO
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from rich.console import Console
from typer.testing import CliRunner

from serving.cli import app
from serving.config import GatewaySpec
from serving.errors import InvalidArgumentError, UnavailableError
from serving.gateway.http import make_app
from serving.gateway.stats import Stats, read
from serving.top import frame, scraper, show
from tests import tiny
from tests.gateway.harness import house
from tests.gateway.ingress import http_port, patient  # noqa: F401  (used by being here)

EXPOSITION = """
# TYPE fathom:slots gauge
fathom:slots{{model="a",replica="r0"}} 8.0
fathom:slots{{model="a",replica="r1"}} 8.0
# TYPE fathom:num_requests_running gauge
fathom:num_requests_running{{model="a",replica="r0"}} 3.0
fathom:num_requests_running{{model="a",replica="r1"}} 1.0
# TYPE fathom:generation_tokens counter
fathom:generation_tokens_total{{model="a",replica="r0"}} {tokens}
# TYPE fathom:generation_tokens_by_depth counter
fathom:generation_tokens_by_depth_total{{model="a",replica="r0",depth="1",exit_reason="gated"}} {tokens}
fathom:generation_tokens_by_depth_total{{model="a",replica="r1",depth="3",exit_reason="full_depth"}} {tokens}
# TYPE fathom:request_success counter
fathom:request_success_total{{model="a",replica="r0",finished_reason="stop"}} {tokens}
"""
BOUNDS = (0.01, 0.1, 1.0)


def reading(tokens: float, at: float) -> Stats:
    return read(EXPOSITION.format(tokens=tokens), at=at)


def drawn(stats: Stats, before: Stats) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(frame(stats, before))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_models_figures_are_those_of_its_replicas_together() -> None:
    model = reading(100, 0).models["a"]
    assert (model.slots, model.running) == (16, 4)
    assert model.by_depth == {"1": 100, "3": 100} and model.by_reason == {"gated": 100, "full_depth": 100}
    assert {name: replica.running for name, replica in model.replicas.items()} == {"r0": 3, "r1": 1}
    assert read("", ["b"], at=0).models["b"].slots == 0


def test_a_frame_tells_the_differences() -> None:
    text = drawn(reading(150, 4.0), reading(100, 2.0))
    whole, first, second = text.splitlines()[2:5]
    assert "4/16" in whole and " 25 " in whole and "25.0" in whole and "2.00" in whole
    assert "r0" in first and "3/8" in first and "1.00" in first
    assert "r1" in second and "1/8" in second and "3.00" in second
    idle = drawn(reading(150, 4.0), reading(150, 2.0)).splitlines()[2]
    assert "25" not in idle and "-" in idle


def test_counters_that_begin_again_are_no_negative_rates() -> None:
    assert "-5" not in drawn(reading(5, 2.0), reading(100, 0.0))


@given(values=st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=60), share=st.floats(0.01, 1))
def test_quantiles_lie_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    registry = CollectorRegistry()
    name = "fathom:time_to_first_token_seconds"
    made = Histogram(name, "x", ("model", "replica"), registry=registry, buckets=BOUNDS).labels("m", "r")
    for value in values:
        made.observe(value)
    found = read(generate_latest(registry).decode()).models["m"].first_token.quantile(share)
    true = float(np.quantile(values, share, method="inverted_cdf"))
    edges = [0.0, *BOUNDS, np.inf]
    low, high = next((low, high) for low, high in pairwise(edges) if low < true <= high)
    assert found is not None
    assert low <= found <= (high if high < np.inf else BOUNDS[-1])


async def test_statistics_and_top_of_a_real_gateway(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "looped", tiny.LOOPED, scale=2.5)
    async with (
        house(folder) as h,
        http_port(make_app(h.requests, h.fleet, GatewaySpec(), h.metrics)) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        body = {"prompt": "a", "max_tokens": 40, "ignore_eos": True, "depth": "gate(0.5)"}
        before = read((await client.get("/metrics")).text)
        await client.post("/v1/completions", json=body)
        after = read((await client.get("/metrics")).text)
        told = (await client.get("/v1/fathom/stats")).json()["models"]["looped"]
        assert told["generated"] == sum(told["by_depth"].values()) == 40
        assert told["slots"] == 8 and list(told["replicas"]) == ["r0"]
        assert told["stage_ticks"].keys() == told["stage_rows"].keys() == {"0", "1", "2"}
        assert told["between_tokens"][-1] == [None, 39] and told["ended"]["length"] == 1
        text = drawn(after, before)
        assert "looped" in text and "0/8" in text


def test_one_frame_is_printed_to_a_pipe() -> None:
    readings = iter([reading(0, 0.0), reading(10, 1.0)])
    console = Console(file=StringIO(), width=40)
    show(lambda: next(readings), 1e-9, once=True, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and "4/16" in text, "nothing is cut off"


def test_what_top_cannot_show() -> None:
    with pytest.raises(UnavailableError, match=r"no metrics at http://127\.0\.0\.1:1/metrics"):
        scraper("127.0.0.1:1")()
    with pytest.raises(InvalidArgumentError, match="--interval = 0"):
        show(lambda: reading(0, 0.0), 0.0, once=True)
    done = CliRunner().invoke(app, ["top", "--once", "--target", "127.0.0.1:1"])
    assert done.exit_code == 1 and isinstance(done.exception, UnavailableError)
