"""Which stage runs next.

A tick of stage s costs a launch A_s, however few its rows, and so much a row. Of N rows that are parked somewhere, w
at s, a tick of s gives the rest no ride on its launch: it wastes A_s (1 - w / N). The stage that wastes least runs.
So rows that have left the core wait for its ticks while they are few, and are served as soon as the places that they
leave empty there cost more than a launch for them alone; where launches cost nothing, the fullest stage runs.
Nothing waits longer than PATIENCE ticks.
"""

import numpy as np

from serving.engine.core import Ints
from serving.engine.costs import Cost

PATIENCE = 16


class StageChooser:
    """Learns what the stages cost, and chooses among those where something is parked."""

    def __init__(self, first: int | None, final: frozenset[int]):
        """`first`: the stage at which tokens begin; `final`: those that end with the head. A row that is through a
        final stage begins again at the first one, and is in nobody's batch before it has passed both. None: tokens
        come back to the stage at which they begin, so that others are there too."""
        self._first, self._final = first, final
        self._costs: dict[int, Cost] = {}

    def ran(self, stage: int, tokens: int, seconds: float) -> None:
        """Learn from a tick."""
        self._costs.setdefault(stage, Cost()).observe(tokens, seconds)

    def choose(self, stages: Ints, tokens: Ints, waited: Ints) -> int:
        """`stages`, `tokens` and ticks `waited` of everything that is parked; the stage to run."""
        waiting = np.bincount(stages, weights=tokens)
        there = np.flatnonzero(waiting).tolist()
        if len(there) == 1:
            return there[0]
        oldest = int(waited.argmax())
        if waited[oldest] > PATIENCE:
            return int(stages[oldest])
        share = waiting / waiting.sum()
        # Of equals the fullest, then the one nearest to the head.
        return min(there, key=lambda s: (round(self._launch(s) * (1 - share[s]), 9), -share[s], -s))

    def _launch(self, stage: int) -> float:
        """Seconds of a run however few its rows."""
        stages = [stage, self._first] if stage in self._final else [stage]
        return sum(self._costs[s].fixed for s in stages if s is not None and s in self._costs)
