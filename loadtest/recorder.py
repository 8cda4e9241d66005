"""Samples as columns: a few numbers for each request and two for each message, whatever the length of the
run."""

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.core import Sample

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Columns:
    """What was recorded. One row a request, in the order of their ends; times in seconds of one clock."""

    intended: Floats
    sent: Floats
    end: Floats
    status: Ints  # index into `statuses`
    policy: Ints  # index into `policies`
    turn: Ints
    asked: Ints
    prompt: Ints
    cached: Ints
    mean_depth: Floats  # nan where the server does not say
    flops_saved: Floats
    messages: Ints  # of each request, one after the other in `stamps` and `counts`
    stamps: Floats
    counts: Ints  # tokens
    statuses: list[str]
    policies: list[str]
    details: dict[str, str]  # of the first request that ended with each status

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        return (
            self.status == self.statuses.index("OK")
            if "OK" in self.statuses
            else np.zeros(len(self.status), bool)
        )

    def where(self, rows: npt.NDArray[np.bool_]) -> "Columns":
        """Those requests only."""
        messages = np.repeat(rows, self.messages)
        columns = {name: getattr(self, name) for name in self.__slots__}
        columns |= {name: column[rows] for name, column in columns.items() if name in _REQUEST}
        return Columns(**columns | {"stamps": self.stamps[messages], "counts": self.counts[messages]})


_REQUEST = {"intended", "sent", "end", "status", "policy", "turn", "asked", "prompt", "cached"}
_REQUEST |= {"mean_depth", "flops_saved", "messages"}


class Recorder:
    def __init__(self) -> None:
        self._floats = {
            name: array("d") for name in ("intended", "sent", "end", "mean_depth", "flops_saved", "stamps")
        }
        names = ("status", "policy", "turn", "asked", "prompt", "cached", "messages", "counts")
        self._ints = {name: array("q") for name in names}
        self._statuses: dict[str, int] = {}
        self._policies: dict[str, int] = {}
        self._details: dict[str, str] = {}
        self.finished = 0
        self.failed = 0
        self.tokens = 0

    def add(self, sample: Sample) -> None:
        floats, ints = self._floats, self._ints
        floats["intended"].append(sample.intended)
        floats["sent"].append(sample.sent)
        floats["end"].append(sample.end)
        floats["mean_depth"].append(sample.mean_depth)
        floats["flops_saved"].append(sample.flops_saved)
        floats["stamps"].extend(sample.stamps)
        ints["status"].append(self._statuses.setdefault(sample.status, len(self._statuses)))
        ints["policy"].append(self._policies.setdefault(sample.policy, len(self._policies)))
        ints["turn"].append(sample.turn)
        ints["asked"].append(sample.asked)
        ints["prompt"].append(sample.prompt_tokens)
        ints["cached"].append(sample.cached_tokens)
        ints["messages"].append(len(sample.stamps))
        ints["counts"].extend(sample.counts)
        self.finished += 1
        self.tokens += sum(sample.counts)
        if sample.status != "OK":
            self.failed += 1
            self._details.setdefault(sample.status, sample.detail)

    def columns(self) -> Columns:
        recorded: dict[str, array[Any]] = {**self._floats, **self._ints}
        columns: dict[str, Any] = {name: np.array(column) for name, column in recorded.items()}
        return Columns(
            **columns,
            statuses=list(self._statuses),
            policies=list(self._policies),
            details=self._details,
        )
