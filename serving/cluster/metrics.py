"""Prometheus metrics of one engine replica, named in the manner of vLLM's."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from serving.engine.core import Ints, Request, Tick
from serving.engine.depth import ExitReason
from serving.engine.description import Description
from serving.engine.news import FinishReason, Load, Usage
from serving.engine.observer import Observer

disable_created_metrics()

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS_WAITED = (0, 1, 2, 3, 4, 6, 8, 12, 16)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class BulkHistogram(Collector):
    """A histogram that takes many values at once: a tick has one for each of its sequences, and the client library's
    own takes microseconds for each."""

    def __init__(self, name: str, text: str, labels: Mapping[str, str]):
        self._name, self._text, self._labels = name, text, labels
        self._counts = np.zeros(len(SECONDS) + 1, np.int64)
        self._sum = 0.0

    def observe(self, seconds: npt.NDArray[np.float64]) -> None:
        self._counts += np.bincount(np.searchsorted(SECONDS, seconds), minlength=len(self._counts))
        self._sum += float(seconds.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        bounds = [*(str(float(b)) for b in SECONDS), "+Inf"]
        buckets = list(zip(bounds, self._counts.cumsum().tolist(), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


class ByDepth(Collector):
    """Counters by depth and one more label, fed with the depths of a whole tick at a time."""

    def __init__(self, name: str, text: str, labels: Mapping[str, str], label: str):
        self._name, self._text, self._labels, self._label = name, text, labels, label
        self._counts: dict[str, Ints] = {}

    def add(self, value: str, depths: Ints) -> None:
        more = np.bincount(depths)
        known = self._counts.get(value)
        if known is None or len(known) < len(more):
            self._counts[value] = more if known is None else more + np.pad(known, (0, len(more) - len(known)))
        else:
            known[: len(more)] += more

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=[*self._labels, self._label, "depth"])
        for value, counts in list(self._counts.items()):
            for depth in np.flatnonzero(counts).tolist():
                family.add_metric([*self._labels.values(), value, str(depth)], float(counts[depth]))
        yield family


class EngineMetrics(Observer):
    """Counts what the engine reports."""

    def __init__(self, model: str, replica: str):
        self.registry = CollectorRegistry()
        labels = {"model": model, "replica": replica}
        names, values = tuple(labels), tuple(labels.values())

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            made = Histogram(f"fathom:{name}", text, names, registry=self.registry, buckets=buckets)
            return made.labels(*values)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"fathom:{name}", text, names, registry=self.registry).labels(*values)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"fathom:{name}", text, names, registry=self.registry).labels(*values)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival in the engine to the first token")
        self._itl = BulkHistogram(
            "fathom:inter_token_latency_seconds", "Between successive tokens of a sequence", labels
        )
        self.registry.register(self._itl)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival in the engine to the last token")
        self._queue = histogram("request_queue_time_seconds", "From arrival to a slot")
        self._prefill = histogram("request_prefill_time_seconds", "From the slot to the first token")
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last")
        self._tick = histogram("tick_seconds", "One run of one stage")
        self._rows = histogram("tick_rows", "Decoding rows of one tick", ROWS)
        self._prefill_tokens = histogram("tick_prefill_tokens", "Prompt tokens of one tick", ROWS)
        self._stage_tokens = ByDepth(
            "fathom:stage_tokens",
            "Tokens that a stage was run for, by the depth that they reached by it",
            labels,
            "stage",
        )
        self._depths = ByDepth(
            "fathom:generation_tokens_by_depth",
            "Tokens generated, by depth and why no deeper",
            labels,
            "exit_reason",
        )
        self.registry.register(self._stage_tokens)
        self.registry.register(self._depths)
        self._stage_ticks = Counter(
            "fathom:stage_ticks", "Runs of a stage", (*names, "stage"), registry=self.registry
        )
        self._ticks_of = lambda stage: self._stage_ticks.labels(*values, stage)
        self._wait = histogram(
            "final_stage_wait_ticks", "Ticks that rows waited for the head to run", ROWS_WAITED
        )
        self._refills = counter("refills", "Tokens that took a place while others were on their way")
        self._prompt = counter("prompt_tokens", "Prompt tokens taken in")
        self._generated = counter("generation_tokens", "Tokens generated")
        self._running = gauge("num_requests_running", "Sequences that hold a slot")
        self._waiting = gauge("num_requests_waiting", "Requests in the queue")
        self._slots = gauge("slots", "Sequences that can run at a time")
        self._used = gauge("slots_used", "Slots that are taken")
        self._bytes = gauge("state_bytes_per_sequence", "Memory of one sequence, however long it grows")
        self._success = Counter(
            "fathom:request_success", "Requests ended", (*names, "finished_reason"), registry=self.registry
        )
        self._ended = {reason: self._success.labels(*values, reason.value) for reason in FinishReason}

    def describe(self, description: Description) -> None:
        self._slots.set(description.slots)
        self._bytes.set(description.state_bytes_per_sequence)

    def load(self, load: Load) -> None:
        self._running.set(load.running)
        self._used.set(load.running)
        self._waiting.set(load.waiting)

    def ticked(self, tick: Tick, seconds: float) -> None:
        self._tick.observe(seconds)
        self._rows.observe(len(tick.slots))
        stage = str(tick.stage)
        self._ticks_of(stage).inc()
        self._refills.inc(tick.refills)
        if tick.final and len(tick.waited):
            self._wait.observe(float(tick.waited.mean()))
        if tick.units is not None:
            self._stage_tokens.add(stage, tick.units)
        if tick.chunks:
            tokens = tick.prefill_tokens
            self._prefill_tokens.observe(tokens)
            if tick.final:  # where all of them pass once
                self._prompt.inc(tokens)

    def emitted(self, units: Ints, reasons: Ints, gaps: npt.NDArray[np.float64]) -> None:
        self._generated.inc(len(units))
        self._itl.observe(gaps)
        for reason in np.unique(reasons).tolist():
            self._depths.add(ExitReason(reason).name.lower(), units[reasons == reason])

    def finished(self, request: Request, reason: FinishReason, usage: Usage) -> None:
        self._ended[reason].inc()
        self._queue.observe(usage.queue_s)
        self._prefill.observe(usage.prefill_s)
        self._decode.observe(usage.decode_s)
        self._e2e.observe(usage.queue_s + usage.prefill_s + usage.decode_s)
        if request.first_token is not None:
            self._ttft.observe(usage.queue_s + usage.prefill_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)
