"""Which stage runs next.

A tick of stage s costs a launch A_s, however few its rows, and so much a row. Of N rows that are parked somewhere r_s N
pass s on their way to the head, w of them are there now, and a tick of s gives the rest no ride on its launch: it
wastes A_s (1 - w / r_s N). The stage that wastes least runs. So rows that have left the core wait for its ticks while
they are few, and are served as soon as the places that they leave empty there cost more than a launch for them
alone; those that go deepest go as soon as all are there that will; where launches cost nothing, the fullest stage
runs. Nothing waits longer than PATIENCE ticks. r_s is what it has been of late.
"""

from collections.abc import Sequence

from serving.engine.costs import MEMORY, Cost

PATIENCE = 16


class StageChooser:
    """Learns what the stages cost, and chooses among those where something is parked."""

    def __init__(self, first: int | None, final: frozenset[int]):
        """`first`: the stage at which tokens begin; `final`: those that end with the head. A row that is through a
        final stage begins again at the first one, and is in nobody's batch before it has passed both. None: tokens
        come back to the stage at which they begin, so that others are there too."""
        self._first, self._final = first, final
        self._passed: dict[int, float] = {}  # tokens through each stage, older ones fading away
        self._costs: dict[int, Cost] = {}
        self._fixed: dict[int, float] = {}  # of these, as it is now

    def ran(self, stage: int, tokens: int, seconds: float) -> None:
        """Learn from a tick."""
        cost = self._costs.setdefault(stage, Cost())
        cost.observe(tokens, seconds)
        self._fixed[stage] = cost.fixed
        for known in self._passed:
            self._passed[known] *= MEMORY
        self._passed[stage] = self._passed.get(stage, 0.0) + tokens

    def choose(self, waiting: Sequence[int], oldest: int, since: int, tick: int) -> int:
        """The stage to run at this tick, of those where so many tokens are `waiting`; at the `oldest` of them something
        has been parked for longest, since which tick."""
        there = [stage for stage, count in enumerate(waiting) if count]
        if len(there) == 1:
            return there[0]
        if tick - since > PATIENCE:
            return oldest
        parked = sum(waiting)
        whole = sum(self._passed.get(final, 0.0) for final in self._final)
        share = {s: min(1.0, waiting[s] / (parked * self._reach(s, whole))) for s in there}
        # Of equals the fullest, then the one nearest to the head.
        return min(there, key=lambda s: (round(self._launch(s) * (1 - share[s]), 9), -share[s], -s))

    def _reach(self, stage: int, whole: float) -> float:
        """The share of tokens that pass this stage, of so many that pass the head."""
        passed = self._passed.get(stage, 0.0)
        return passed / whole if 0 < passed < whole else 1.0

    def _launch(self, stage: int) -> float:
        """Seconds of a run however few its rows."""
        stages = [stage] if self._first is None or stage not in self._final else [stage, self._first]
        return sum(self._fixed.get(s, 0.0) for s in stages)
