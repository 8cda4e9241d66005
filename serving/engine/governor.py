"""Sheds depth before requests: under overload, tokens leave earlier, as far down as their requests allow."""

from collections.abc import Callable

import numpy as np

from serving.engine.core import Ints

RISE_S = 1.0  # seconds of overload until all depth that may be shed is
FALL_S = 4.0  # seconds without it until all is given back


class Governor:
    """While the oldest waiting request has waited longer than `target_s`, lowers the ceiling of depth step by step;
    while nothing waits, raises it again, more slowly."""

    def __init__(self, target_s: float | None, clock: Callable[[], float]):
        """None: never."""
        self.shed = 0.0  # share of the depth between a request's floor and the full depth that is taken away
        self._target_s = target_s
        self._clock = clock
        self._last = clock()

    def observe(self, oldest_arrival: float | None) -> None:
        """Once a tick: when the oldest request that still waits arrived, if any does."""
        now = self._clock()
        passed, self._last = now - self._last, now
        if self._target_s is None:
            return
        if oldest_arrival is None:
            self.shed = max(0.0, self.shed - passed / FALL_S)
        elif now - oldest_arrival > self._target_s:
            self.shed = min(1.0, self.shed + passed / RISE_S)

    def ceilings(self, full: Ints, floors: Ints) -> Ints:
        """The depth at which each token has to leave, given the full depth of its path and its request's floor."""
        if self.shed == 0:
            return full
        return np.maximum(floors, np.ceil(full - self.shed * np.maximum(full - floors, 0)).astype(np.int64))
