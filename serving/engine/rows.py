"""What every slot is about, as columns: a tick moves all rows of a stage with a few array operations."""

import numpy as np
import numpy.typing as npt

from serving.engine.columns import FULL_DEPTH, IDLE
from serving.engine.core import Ints
from serving.engine.depth import ExitReason

__all__ = ["FULL_DEPTH", "IDLE", "MANY", "Rows"]

MANY = 1 << 30

Times = npt.NDArray[np.float64]


class Rows:
    """Columns indexed by slot. A slot whose node is IDLE has no decoding row: it is free, prefilling, or one of the
    further slots of a sequence that has several."""

    def __init__(self, slots: int):
        def column(value: int) -> Ints:
            return np.full(slots + 1, value, np.int64)

        # The row: one token on its way.
        self.node = column(IDLE)  # where on its path it is parked
        self.token = column(0)  # the token that it feeds
        self.position = column(0)  # of that token in its sequence
        self.since = column(0)  # the tick at which it was parked
        self.units = column(0)  # depth that the token has reached
        self.streak = column(0)  # passes in a row after which its prediction was the same as before
        self.reason = column(FULL_DEPTH)  # why it went no deeper
        # The sequence.
        self.path = column(0)
        self.seed = np.zeros(slots + 1, np.uint64)
        self.further: dict[int, Ints] = {}  # all slots of a sequence that has several, by its first
        self.emitted = np.full(slots + 1, np.nan)  # when its last token came out; nan before the first
        # Its depth policy.
        self.signal = column(IDLE)  # index into SIGNALS
        self.threshold = np.zeros(slots + 1)
        self.floor = column(0)  # a token may not leave before
        self.ceiling = column(MANY)  # a token leaves here at the latest
        self.reach = column(
            MANY
        )  # the deepest that any token of the sequence may come: a deadline moves the ceiling
        self.full = column(0)  # depth of its path
        self.pace = np.full(slots + 1, np.nan)  # seconds that its tokens take for each unit of depth
        self.shed = column(MANY)  # the governor may lower the ceiling down to here
        self.early = column(FULL_DEPTH)  # reason when the signal lets it leave
        self.capped = column(ExitReason.FIXED_DEPTH)  # reason when the ceiling makes it leave

    def feed(self, slots: Ints, tokens: Ints, positions: Ints, tick: int) -> None:
        """Send tokens on their way."""
        self.node[slots] = 0
        self.token[slots] = tokens
        self.position[slots] = positions
        self.since[slots] = tick
        self.units[slots] = 0
        self.streak[slots] = 0
        self.reason[slots] = FULL_DEPTH

    def held(self, slots: Ints, places: Ints, occurrence_of: Ints) -> Ints:
        """The slot that holds the state of each row: its own, or for a repeated layer one of its further ones."""
        if not self.further:
            return slots
        pairs = zip(slots.tolist(), occurrence_of[places].tolist(), strict=True)
        return np.array([self.further[s][o] if o else s for s, o in pairs], np.int64)

    def drop(self, slot: int) -> None:
        self.node[slot] = IDLE
        self.emitted[slot] = self.pace[slot] = np.nan
        self.further.pop(slot, None)

    def gaps(self, slots: Ints, now: float) -> Times:
        """Seconds since the last token of each slot, nan for those that had none; from here on `now` is their last."""
        since = now - self.emitted[slots]
        self.emitted[slots] = now
        return since
