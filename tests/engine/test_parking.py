"""Rows that wait between two stages."""

import numpy as np
import pytest
import torch

from serving.engine.parking import Parking


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_slot_gives_back_what_it_was_given(dtype: torch.dtype) -> None:
    parking, rows = Parking(9, 5, dtype, torch.device("cpu")), torch.randn(4, 5).to(dtype)
    slots = np.array([7, 1, 4, 2])
    parking.put(slots, rows)
    parking.put(slots[:1], rows[:1] + 1)
    assert torch.equal(parking.take(slots[1:]), rows[1:])
    taken = parking.take(np.array([7, 0]))
    assert torch.equal(taken, torch.stack([rows[0] + 1, torch.zeros(5, dtype=dtype)]))
    taken.zero_()  # a copy
    assert torch.equal(parking.take(slots[:1]), rows[:1] + 1)
