"""What every slot is about, as columns: a tick moves all rows of a stage with a few array operations."""

import numpy as np
import numpy.typing as npt

from serving.engine import columns
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
        self.table = np.zeros((len(columns.COLUMNS), slots + 1), np.int64)

        def column(number: int, value: int) -> Ints:
            self.table[number] = value
            return self.table[number]

        # The row: one token on its way.
        self.node = column(columns.NODE, IDLE)  # where on its path it is parked
        self.token = column(columns.TOKEN, 0)  # the token that it feeds
        self.position = column(columns.POSITION, 0)  # of that token in its sequence
        self.since = column(columns.SINCE, 0)  # the tick at which it was parked
        self.units = column(columns.UNITS, 0)  # depth that the token has reached
        self.streak = column(columns.STREAK, 0)  # passes in a row that did not change its prediction
        self.reason = column(columns.REASON, FULL_DEPTH)  # why it went no deeper
        # The sequence.
        self.path = column(columns.PATH, 0)
        self.seed = column(columns.SEED, 0).view(np.uint64)
        self.further: dict[int, Ints] = {}  # all slots of a sequence that has several, by its first
        self.emitted = np.full(slots + 1, np.nan)  # when its last token came out; nan before the first
        # Its depth policy.
        self.signal = column(columns.SIGNAL, IDLE)  # index into SIGNALS
        self.threshold = np.zeros(slots + 1)
        self.floor = column(columns.FLOOR, 0)  # a token may not leave before
        self.ceiling = column(columns.CEILING, MANY)  # a token leaves here at the latest
        self.reach = column(columns.REACH, MANY)  # no token comes deeper, whatever a deadline does
        self.full = column(columns.FULL, 0)  # depth of its path
        self.pace = np.full(slots + 1, np.nan)  # seconds that its tokens take for each unit of depth
        self.shed = column(columns.SHED, MANY)  # the governor may lower the ceiling down to here
        self.early = column(columns.EARLY, FULL_DEPTH)  # reason when the signal lets it leave
        self.capped = column(columns.CAPPED, ExitReason.FIXED_DEPTH)  # reason when the ceiling makes it leave

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
