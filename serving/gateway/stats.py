"""What the metrics say, for people: of each model its replicas, its load, and counters to take differences of."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(slots=True)
class Times:
    """A histogram of seconds."""

    counts: dict[float, float] = field(
        default_factory=dict
    )  # upper bound -> how many are at most that, cumulative

    def since(self, before: "Times") -> "Times":
        return Times({bound: count - before.counts.get(bound, 0) for bound, count in self.counts.items()})

    def quantile(self, share: float) -> float | None:
        """Seconds, as if the values of a bucket were spread evenly over it; None where there are none. Those above the
        last bound are told as that bound."""
        bounds = sorted(self.counts)
        total = self.counts[bounds[-1]] if bounds else 0
        if total <= 0:
            return None
        wanted = share * total
        for low, high in pairwise([0.0, *bounds]):
            below, upto = self.counts.get(low, 0), self.counts[high]
            if upto >= wanted:
                return (
                    low
                    if high == float("inf")
                    else low + (high - low) * (wanted - below) / (upto - below or 1)
                )
        return bounds[-1]


@dataclass(slots=True)
class ReplicaStats:
    """One replica, or all of a model together."""

    slots: float = 0
    running: float = 0
    waiting: float = 0
    generated: float = 0  # tokens; like all below, since the replica started
    by_depth: dict[str, float] = field(default_factory=dict)  # tokens generated at each depth
    by_reason: dict[str, float] = field(default_factory=dict)  # why no deeper
    stage_rows: dict[str, dict[str, float]] = field(default_factory=dict)  # stage -> depth reached -> tokens
    stage_ticks: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)  # requests, by their end
    first_token: Times = field(default_factory=Times)
    between_tokens: Times = field(default_factory=Times)
    whole_request: Times = field(default_factory=Times)


@dataclass(slots=True)
class ModelStats(ReplicaStats):
    replicas: dict[str, ReplicaStats] = field(default_factory=dict)


@dataclass(slots=True)
class Stats:
    """Everything, at one time."""

    at: float  # seconds, of a clock that only differences are taken of
    models: dict[str, ModelStats] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Histograms as lists of [bound, cumulative count]; the bound of the last is null."""
        return {"at": self.at, "models": {name: _json(asdict(model)) for name, model in self.models.items()}}


def _json(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"counts"}:
        bounds = sorted(value["counts"].items())
        return [[None if bound == float("inf") else bound, count] for bound, count in bounds]
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return value


def _gauge(name: str) -> Callable[[ReplicaStats, Sample], None]:
    def add(stats: ReplicaStats, sample: Sample) -> None:
        setattr(stats, name, getattr(stats, name) + sample.value)

    return add


def _by(name: str, label: str) -> Callable[[ReplicaStats, Sample], None]:
    def add(stats: ReplicaStats, sample: Sample) -> None:
        _add(getattr(stats, name), sample.labels[label], sample.value)

    return add


def _times(name: str) -> Callable[[ReplicaStats, Sample], None]:
    def add(stats: ReplicaStats, sample: Sample) -> None:
        _add(getattr(stats, name).counts, float(sample.labels["le"]), sample.value)

    return add


def _depth_and_reason(stats: ReplicaStats, sample: Sample) -> None:
    _add(stats.by_depth, sample.labels["depth"], sample.value)
    _add(stats.by_reason, sample.labels["exit_reason"], sample.value)


def _stage_rows(stats: ReplicaStats, sample: Sample) -> None:
    _add(stats.stage_rows.setdefault(sample.labels["stage"], {}), sample.labels["depth"], sample.value)


def _add(counts: dict[Any, float], key: Any, value: float) -> None:
    counts[key] = counts.get(key, 0) + value


READ: dict[str, Callable[[ReplicaStats, Sample], None]] = {
    "fathom:slots": _gauge("slots"),
    "fathom:num_requests_running": _gauge("running"),
    "fathom:num_requests_waiting": _gauge("waiting"),
    "fathom:generation_tokens_total": _gauge("generated"),
    "fathom:generation_tokens_by_depth_total": _depth_and_reason,
    "fathom:stage_tokens_total": _stage_rows,
    "fathom:stage_ticks_total": _by("stage_ticks", "stage"),
    "fathom:request_success_total": _by("ended", "finished_reason"),
    "fathom:time_to_first_token_seconds_bucket": _times("first_token"),
    "fathom:inter_token_latency_seconds_bucket": _times("between_tokens"),
    "fathom:e2e_request_latency_seconds_bucket": _times("whole_request"),
}


def read(metrics: str, names: Iterable[str] = (), at: float | None = None) -> Stats:
    """Of an exposition in Prometheus' text format. `names`: models that are listed even when they say nothing.

    Raises ValueError for a text that is no exposition."""
    stats = Stats(time.monotonic() if at is None else at, {name: ModelStats() for name in names})
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            add = READ.get(sample.name)
            if add is None or "model" not in sample.labels:
                continue
            model = stats.models.setdefault(sample.labels["model"], ModelStats())
            add(model, sample)
            add(model.replicas.setdefault(sample.labels.get("replica", ""), ReplicaStats()), sample)
    return stats
