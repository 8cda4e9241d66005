"""State tracking: negative eigenvalues are what parity takes."""

import pytest

from models.train.parity import accuracy, train


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_negative_eigenvalues_solve_parity_far_beyond_training_and_positive_ones_do_not() -> None:
    with_, without = (train(negative, steps=60, longest=40, seed=0) for negative in (True, False))
    assert accuracy(with_, 41, 160) > 0.95
    assert accuracy(without, 41, 160) < 0.65
