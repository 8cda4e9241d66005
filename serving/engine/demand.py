"""Whether more come than can be served, or a queue is only long."""

import math

WINDOW = 256
"""Turns that are looked back on."""

FEW = 4
"""By so many a queue may grow, and CHANCE standard deviations of its length, without its meaning anything."""

CHANCE = 3


class Demand:
    """Counts those who come against those whose turn comes. Users who each wait for their answer before they ask again
    may keep a queue long for ever, but it does not grow. Where it grows, most of those in it are going to be late, in
    whatever order they are served."""

    def __init__(self) -> None:
        self._surplus = 0  # that came, less those who had their turn or went away
        self._lows = 0, 0  # its least in the window before, and in the present one
        self._left = WINDOW  # turns of the present window

    def came(self) -> None:
        self._surplus += 1

    def went(self) -> None:
        """Somebody went away."""
        self._surplus -= 1
        self._lows = self._lows[0], min(self._lows[1], self._surplus)

    def served(self) -> None:
        self.went()
        self._left -= 1
        if not self._left:
            self._lows, self._left = (self._lows[1], self._surplus), WINDOW

    def exceeds(self, waiting: int) -> bool:
        """Whether more than could be served have come of late, given how many wait now."""
        grown = self._surplus - min(self._lows)
        return grown > FEW + CHANCE * math.sqrt(max(0, waiting - grown))
