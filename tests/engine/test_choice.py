"""Which stage runs next."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.choice import PATIENCE, StageChooser


def learned(chooser: StageChooser, costs: list[tuple[float, float]], tokens: int) -> StageChooser:
    """Ticks of each stage, of up to so many tokens, which cost (a launch, and so much a token)."""
    for i in range(200):
        for stage, (launch, each) in enumerate(costs):
            count = tokens - i % 3
            chooser.ran(stage, count, launch + each * count)
    return chooser


@given(st.floats(0, 1), st.floats(0, 1))
def test_it_finds_what_a_launch_costs(launch: float, each: float) -> None:
    chooser = learned(StageChooser(0, frozenset({1})), [(launch, each)], 9)
    assert chooser._launches[0] == pytest.approx(launch, abs=1e-6)


def test_ticks_of_one_size_count_as_a_launch() -> None:
    """Nothing tells the two apart; a tick of fewer would cost no less."""
    chooser = StageChooser(0, frozenset({1}))
    for _ in range(9):
        chooser.ran(0, 4, 0.25)
    assert chooser._launches[0] == pytest.approx(0.25)


def test_the_dear_launch_waits_for_the_few() -> None:
    chooser = learned(StageChooser(0, frozenset({2})), [(1.0, 0.1), (8.0, 0.1), (1.0, 0.1)], 9)
    assert chooser.choose(np.array([0, 2, 7]), oldest=1, since=5, tick=6) == 2
    assert chooser.choose(np.array([0, 9, 0]), oldest=1, since=5, tick=6) == 1


def test_nobody_waits_for_ever() -> None:
    chooser = learned(StageChooser(0, frozenset({1})), [(1.0, 0.1), (8.0, 0.1)], 9)
    waiting = np.array([8, 1])
    assert chooser.choose(waiting, oldest=1, since=0, tick=PATIENCE) == 0
    assert chooser.choose(waiting, oldest=1, since=0, tick=PATIENCE + 1) == 1


def test_a_request_may_bring_more_stages() -> None:
    chooser = learned(StageChooser(0, frozenset({1})), [(1.0, 0.1)], 9)
    assert chooser.choose(np.array([0, 0, 0, 0, 3]), oldest=4, since=0, tick=1) == 4
    chooser.ran(6, 3, 1.0)
    assert chooser.choose(np.array([0, 0, 0, 0, 0, 0, 3]), oldest=6, since=0, tick=1) == 6
