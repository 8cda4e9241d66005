"""The plots of a report."""

import matplotlib

matplotlib.use("Agg")  # before pyplot, and without a display

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot

from loadtest.result import Result
from loadtest.table import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from loadtest.search import Found

Draw = Callable[["Axes"], None]


def of_result(result: Result) -> Iterator[tuple[str, "Figure"]]:
    """Name and figure of each plot. The caller closes them."""
    yield "latencies", _figure(lambda axes: _latencies(axes, result))
    yield "rates", _figure(lambda axes: _rates(axes, result))
    yield "tokens", _figure(lambda axes: _tokens(axes, result))
    yield "first_token", _figure(lambda axes: _first_token(axes, result))
    if len(result.policies) > 1:
        yield "policies", _figure(lambda axes: _policies(axes, result))


def of_search(found: "Found") -> Iterator[tuple[str, "Figure"]]:
    yield "attainment", _figure(lambda axes: _attainment(axes, found))
    yield "latency_by_rate", _figure(lambda axes: _latency_by_rate(axes, found))


def _figure(draw: Draw) -> "Figure":
    figure, axes = pyplot.subplots(figsize=(7.5, 3.6), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return figure


def _latencies(axes: "Axes", result: Result) -> None:
    for field in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        values, shares = getattr(result, field).curve()
        if len(values):
            axes.step(np.maximum(values, 1e-3), shares, where="post", label=METRICS[field])
    axes.set(xscale="log", xlabel="milliseconds", ylabel="share at most", title="Latencies")


def _times(result: Result) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.arange(len(result.timeline.sent), dtype=np.float64) * result.timeline.bucket_s


def _rates(axes: "Axes", result: Result) -> None:
    line, width = result.timeline, result.timeline.bucket_s
    if result.loop == "open":
        axes.step(
            _times(result), np.array(line.offered) / width, where="post", label="offered", linestyle=":"
        )
    for name in ("sent", "ok", "failed"):
        if any(values := getattr(line, name)):
            axes.step(_times(result), np.array(values) / width, where="post", label=name)
    axes.set(xlabel="seconds", ylabel="requests/s", title="Requests", ylim=(0, None))


def _tokens(axes: "Axes", result: Result) -> None:
    line = result.timeline
    axes.step(
        _times(result), np.array(line.output_tokens) / line.bucket_s, where="post", label="output tokens/s"
    )
    axes.set(xlabel="seconds", ylabel="tokens/s", title="Throughput and requests under way", ylim=(0, None))
    other = axes.twinx()
    other.step(_times(result), line.in_flight, where="post", color="C1")
    other.set_ylabel("requests under way", color="C1")
    other.set_ylim(0, None)


def _first_token(axes: "Axes", result: Result) -> None:
    for name, values in (("p50", result.timeline.ttft_p50_ms), ("p99", result.timeline.ttft_p99_ms)):
        axes.plot(
            _times(result), [np.nan if value is None else value for value in values], marker=".", label=name
        )
    axes.set(xlabel="seconds, when sent", ylabel="milliseconds", title="Time to first token", ylim=(0, None))


def _policies(axes: "Axes", result: Result) -> None:
    for name, group in result.policies.items():
        values, shares = group.tpot_ms.curve()
        if len(values):
            axes.step(values, shares, where="post", label=name)
    axes.set(xlabel="milliseconds", ylabel="share at most", title="Time per output token, by depth policy")


def _attainment(axes: "Axes", found: "Found") -> None:
    probes = sorted(found.probes, key=lambda probe: probe.rate)
    shares = [probe.result.goodput.share if probe.result.goodput else 0.0 for probe in probes]
    axes.plot([probe.rate for probe in probes], shares, marker="o", label="meet every objective")
    axes.axhline(found.attainment, linestyle=":", label="wanted")
    axes.set(
        xscale="log",
        xlabel="requests/s offered",
        ylabel="share of requests",
        title="Attainment",
        ylim=(0, 1.02),
    )


def _latency_by_rate(axes: "Axes", found: "Found") -> None:
    probes = sorted(found.probes, key=lambda probe: probe.rate)
    for field, title in (("ttft_from_schedule_ms", "first token p99"), ("tpot_ms", "per output token p99")):
        found_at = [(probe.rate, getattr(probe.result, field)) for probe in probes]
        points = [
            (rate, figure.p99) for rate, figure in found_at if figure is not None and figure.p99 is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=title)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="requests/s offered",
        ylabel="milliseconds",
        title="Latency by rate",
    )
