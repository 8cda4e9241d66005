"""From columns to figures. The definitions are those of docs/loadtest.md."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.histogram import Distribution
from loadtest.recorder import Columns, Floats, Ints
from loadtest.result import Goodput, Group, Lengths, Steady, Timeline
from loadtest.slo import Slo

Mask = npt.NDArray[np.bool_]
_TIMELINE = 120  # buckets at most


@dataclass(frozen=True, slots=True)
class Times:
    """Of requests that ended well and gave tokens; seconds."""

    first: Floats  # when the first token arrived
    last: Floats
    tokens: Ints
    sent: Floats
    intended: Floats

    @classmethod
    def of(cls, done: Columns) -> "Times":
        starts = np.concatenate([[0], np.cumsum(done.messages)[:-1]]).astype(np.int64)
        if not len(done.messages):
            empty = np.zeros(0)
            return cls(empty, empty, np.zeros(0, np.int64), empty, empty)
        tokens = np.add.reduceat(done.counts, starts)
        return cls(
            done.stamps[starts], done.stamps[starts + done.messages - 1], tokens, done.sent, done.intended
        )

    @property
    def ttft(self) -> Floats:
        return self.first - self.sent

    @property
    def e2e(self) -> Floats:
        return self.last - self.sent

    @property
    def tpot(self) -> Floats:
        """Of requests with more than one token."""
        several = self.tokens > 1
        return (self.last - self.first)[several] / (self.tokens[several] - 1)


def gaps(done: Columns) -> tuple[Distribution, Distribution]:
    """Inter-token latency, in which the tokens of one message share the time since the one before; and that
    time itself.

    The tokens of a request's first message came with the first: no time passed between them. So the gaps of a
    request are one fewer than its tokens, and sum up to the time from its first to its last.
    """
    firsts = np.zeros(len(done.stamps), bool)
    firsts[
        np.concatenate([[0], np.cumsum(done.messages)[:-1]]).astype(np.int64) if len(done.messages) else []
    ] = True
    waits = np.diff(done.stamps, prepend=0.0)
    later, counts = waits[~firsts], done.counts[~firsts]
    itl = np.append(later / counts, 0.0)
    weights = np.append(counts, (done.counts[firsts] - 1).sum())
    return Distribution.of(itl, weights), Distribution.of(later)


def goodput(
    slos: tuple[Slo, ...], times: Times, requests: int, rate: float | None, open_loop: bool
) -> Goodput | None:
    """Of `requests`, ended well or not. In an open loop the time counts from when a request should have been
    sent."""
    if not slos or not requests:
        return None
    start = times.intended if open_loop else times.sent
    tpot = (times.last - times.first) / np.maximum(1, times.tokens - 1)
    values = {"ttft": times.first - start, "e2e": times.last - start, "tpot": tpot}
    passed = {slo.metric: values[slo.metric] <= slo.limit for slo in slos}
    together = np.logical_and.reduce(list(passed.values()))
    return Goodput(
        slos_ms={slo.metric: slo.limit * 1e3 for slo in slos},
        met={metric: float(ok.sum()) / requests for metric, ok in passed.items()},
        share=float(together.sum()) / requests,
        requests_per_s=(rate or 0.0) * float(together.sum()) / max(1, len(together)),
    )


def group(rows: Columns) -> Group:
    done = rows.where(rows.ok)
    times = Times.of(done)
    return Group(
        requests=len(rows.status),
        failed=len(rows.status) - len(done.status),
        ttft_ms=Distribution.of(times.ttft),
        tpot_ms=Distribution.of(times.tpot),
        e2e_ms=Distribution.of(times.e2e),
        mean_depth=weighted(done.mean_depth, times.tokens),
        flops_saved=weighted(done.flops_saved, times.tokens),
        cached_share=cached_share(done),
    )


def weighted(values: Floats, tokens: Ints) -> float | None:
    """Mean over tokens, of the requests where the server says."""
    known = ~np.isnan(values)
    total = int(tokens[known].sum())
    return float(values[known] @ tokens[known]) / total if total else None


def cached_share(done: Columns) -> float | None:
    total = int(done.prompt.sum())
    return float(done.cached.sum()) / total if total else None


def lengths(done: Columns, scale: float, clipped: int) -> Lengths:
    tokens = Times.of(done).tokens
    known = done.prompt[done.prompt > 0]
    return Lengths(
        input_mean=float(known.mean()) if len(known) else None,
        input_max=int(known.max(initial=0)),
        output_mean=float(tokens.mean()) if len(tokens) else None,
        output_max=int(tokens.max(initial=0)),
        short=int((tokens < done.asked).sum()),
        scale=scale,
        clipped=clipped,
    )


def rate_between(times: Floats) -> float | None:
    """Events per second from the first to the last."""
    span = float(times.max() - times.min()) if len(times) > 1 else 0.0
    return (len(times) - 1) / span if span > 0 else None


def steady(everything: Columns, start: float, stop: float, origin: float) -> Steady | None:
    """Throughput between two times. None where hardly anything ended between them."""
    ended = everything.end[everything.ok]
    inside = int(((ended >= start) & (ended < stop)).sum())
    if stop <= start or inside < 2:
        return None
    arrived = (everything.stamps >= start) & (everything.stamps < stop)
    return Steady(
        start_s=start - origin,
        end_s=stop - origin,
        requests_per_s=inside / (stop - start),
        output_tokens_per_s=float(everything.counts[arrived].sum()) / (stop - start),
    )


def timeline(everything: Columns, origin: float, stop: float) -> Timeline:
    width = _width(stop - origin)
    edges = origin + width * np.arange(max(1, int(np.ceil((stop - origin) / width))) + 1)
    edges[-1] = max(edges[-1], stop) + 1e-9

    def counted(times: Floats, weights: Ints | None = None) -> Ints:
        return np.histogram(times, edges, weights=weights)[0].astype(np.int64)

    ok = everything.ok
    sent, ended = counted(everything.sent), counted(everything.end)
    done = everything.where(ok)
    times = Times.of(done)
    of_bucket = np.digitize(times.sent, edges) - 1
    ttft = [times.ttft[of_bucket == i] for i in range(len(edges) - 1)]
    return Timeline(
        bucket_s=width,
        offered=counted(everything.intended).tolist(),
        sent=sent.tolist(),
        ok=counted(everything.end[ok]).tolist(),
        failed=counted(everything.end[~ok]).tolist(),
        output_tokens=counted(everything.stamps, everything.counts).tolist(),
        in_flight=(sent.cumsum() - ended.cumsum()).tolist(),
        ttft_p50_ms=[_percentile(values, 50) for values in ttft],
        ttft_p99_ms=[_percentile(values, 99) for values in ttft],
    )


def _percentile(seconds: Floats, percent: float) -> float | None:
    return float(np.percentile(seconds, percent)) * 1e3 if len(seconds) else None


def _width(seconds: float) -> float:
    """Of a bucket: 0.1, 0.2, 0.5, 1, 2, 5 ... seconds, so that there are few enough."""
    for exponent in range(-1, 8):
        for step in (1, 2, 5):
            if seconds / (step * 10.0**exponent) <= _TIMELINE:
                return float(step * 10.0**exponent)
    raise ValueError(f"a run of {seconds} s")
