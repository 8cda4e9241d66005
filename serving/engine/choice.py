"""Which stage runs next.

A tick of stage s costs a launch A_s, however few its rows, and so much a row. Of N rows that are parked somewhere r_s N
pass s on their way to the head, w of them are there now, and a tick of s gives the rest no ride on its launch: it
wastes A_s (1 - w / r_s N). The stage that wastes least runs. So rows that have left the core wait for its ticks while
they are few, and are served as soon as the places that they leave empty there cost more than a launch for them
alone; those that go deepest go as soon as all are there that will; where launches cost nothing, the fullest stage
runs. Nothing waits longer than PATIENCE ticks. r_s is what it has been of late, and A_s from a fit of seconds = A_s +
b_s tokens to the ticks of s, older ones fading away.
"""

import numba
import numpy as np
import numpy.typing as npt

from serving.engine.core import Ints

Reals = npt.NDArray[np.float64]

PATIENCE = 16
MEMORY = 0.98  # weight of what was known, at each new tick


class StageChooser:
    """Learns what the stages cost, and chooses among those where something is parked."""

    def __init__(self, first: int | None, final: frozenset[int]):
        """`first`: the stage at which tokens begin; `final`: those that end with the head. A row that is through a
        final stage begins again at the first one, and is in nobody's batch before it has passed both. None: tokens
        come back to the stage at which they begin, so that others are there too."""
        self._first = -1 if first is None else first
        self._final = np.array(sorted(final), np.int64)
        self._passed = np.zeros(0)  # tokens through each stage, older ones fading away
        self._launches = np.zeros(0)  # seconds of a tick of each, however few its tokens; 0 before its first
        self._sums = np.zeros((0, 5))  # of its ticks, faded: see `_learn`

    def ran(self, stage: int, tokens: int, seconds: float) -> None:
        """Learn from a tick."""
        self._make_room(stage + 1)
        _learn(stage, float(tokens), seconds, self._passed, self._launches, self._sums)

    def choose(self, waiting: Ints, oldest: int, since: int, tick: int) -> int:
        """The stage to run at this tick, of those where so many tokens are `waiting`; at the `oldest` of them something
        has been parked for longest, since which tick."""
        if tick - since > PATIENCE:
            return oldest
        self._make_room(len(waiting))
        return _least_waste(waiting, self._first, self._final, self._passed, self._launches)

    def _make_room(self, stages: int) -> None:
        """For this many stages at least: requests may come by paths that have more."""
        more = stages - len(self._passed)
        if more > 0:
            self._passed, self._launches = np.pad(self._passed, (0, more)), np.pad(self._launches, (0, more))
            self._sums = np.pad(self._sums, ((0, more), (0, 0)))


@numba.njit(cache=True, nogil=True)
def _learn(
    stage: int,
    tokens: float,
    seconds: float,
    passed: Reals,  # [stages]
    launches: Reals,  # [stages]
    sums: Reals,  # [stages, 5], of: ticks, tokens, tokens^2, seconds, tokens * seconds
) -> None:
    """Least squares, for one stage."""
    for other in range(passed.size):
        passed[other] *= MEMORY
    passed[stage] += tokens
    mine = sums[stage]
    for i, term in enumerate((1.0, tokens, tokens * tokens, seconds, tokens * seconds)):
        mine[i] = MEMORY * mine[i] + term
    ticks, total, squares, taken, product = mine
    spread, per_token = ticks * squares - total * total, 0.0
    if spread > 1e-9 * ticks * squares:  # else always as many tokens: nothing tells the two apart
        slope = (ticks * product - total * taken) / spread
        per_token = min(max(slope, 0.0), taken / total)
    launches[stage] = max(0.0, (taken - per_token * total) / ticks)


@numba.njit(cache=True, nogil=True)
def _least_waste(waiting: Ints, first: int, final: Ints, passed: Reals, launches: Reals) -> int:
    """Of equals the fullest stage, then the one nearest to the head."""
    parked, whole = waiting.sum(), 0.0
    for stage in final:
        whole += passed[stage]
    chosen, least, fullest = -1, np.inf, 0.0
    for stage in range(waiting.size):
        if waiting[stage] == 0:
            continue
        reach = passed[stage] / whole if 0 < passed[stage] < whole else 1.0
        share = min(1.0, waiting[stage] / (parked * reach))
        launch = launches[stage]
        if first >= 0 and (final == stage).any():
            launch += launches[first]
        waste = round(launch * (1 - share), 9)
        if waste < least or (waste == least and share >= fullest):
            chosen, least, fullest = stage, waste, share
    return chosen
