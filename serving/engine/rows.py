"""Decoding rows, one per slot at most, as columns: a tick moves all rows of a stage with a few array operations."""

import numpy as np
import numpy.typing as npt

from serving.engine.core import ExitReason, Ints

IDLE = -1
Times = npt.NDArray[np.float64]


class Rows:
    """Columns indexed by slot. A slot that is not decoding is IDLE."""

    def __init__(self, slots: int):
        self.node = np.full(slots + 1, IDLE, np.int64)  # where on its path the row is parked
        self.token = np.zeros(slots + 1, np.int64)  # the token that it feeds
        self.position = np.zeros(slots + 1, np.int64)  # of that token in its sequence
        self.since = np.zeros(slots + 1, np.int64)  # the tick at which it was parked
        self.units = np.zeros(slots + 1, np.int64)  # depth that its token has reached
        self.emitted = np.full(slots + 1, np.nan)  # when its last token came out; nan before the first
        self.reason = np.full(slots + 1, ExitReason.FULL_DEPTH, np.int64)  # why it went no deeper

    @property
    def decoding(self) -> int:
        return int((self.node != IDLE).sum())

    def feed(self, slot: int, token: int, position: int, tick: int) -> None:
        """Send a token on its way."""
        self.node[slot] = 0
        self.token[slot] = token
        self.position[slot] = position
        self.since[slot] = tick
        self.units[slot] = 0
        self.reason[slot] = ExitReason.FULL_DEPTH

    def park(self, slots: Ints, nodes: Ints, tick: int) -> None:
        self.node[slots] = nodes
        self.since[slots] = tick

    def drop(self, slot: int) -> None:
        self.node[slot] = IDLE
        self.emitted[slot] = np.nan

    def gaps(self, slots: Ints, now: float) -> Times:
        """Seconds since the last tokens of those slots that had one; from here on `now` is their last."""
        since = now - self.emitted[slots]
        self.emitted[slots] = now
        return since[~np.isnan(since)]
