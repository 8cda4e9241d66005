"""Kernels that are called as they were compiled."""

from typing import Any

import numba
import numpy as np
import torch

from kernels.bound import Bound
from kernels.pool import array_of, tensor_of


@numba.njit
def _scaled(x: Any, scales: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = x[i] * scales[0][i] + scales[1]


def test_it_gives_what_the_kernel_gives() -> None:
    run = Bound(_scaled)
    for size in (3, 0, 5):
        x, scales = np.arange(size, dtype=np.float32), (np.full(size, 2, np.float32), np.float32(1))
        expected, out = np.empty_like(x), np.empty_like(x)
        _scaled(x, scales, expected)
        run(x, scales, out)
        assert np.array_equal(out, expected) and np.array_equal(out, 2 * x + 1)


def test_a_tensor_and_its_array_are_one_memory() -> None:
    array = np.zeros(3, np.int64)
    made = tensor_of(array)
    assert array_of(made) is array
    made += 1
    assert array.tolist() == [1, 1, 1] and array_of(made[1:]).tolist() == [1, 1]
    assert array_of(torch.arange(2)).tolist() == [0, 1]
