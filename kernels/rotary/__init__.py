"""Rotary positions of the rows of a decoding step, on CPUs: one call, in place, where torch makes some twenty."""

import numba
import numpy as np
from torch import Tensor

from kernels.pool import Floats, array_of

__all__ = ["rotate_"]


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def _rotate(
    x: Floats,  # [T, at least heads * D]
    positions: np.ndarray,  # [T] int64
    frequencies: Floats,  # [dim / 2]
    heads: int,
    D: int,
    apart: int,  # columns between the two of a pair
    step: int,  # columns between the first of one pair and that of the next
) -> None:
    pairs = frequencies.shape[0]
    cos, sin = np.empty(pairs, np.float32), np.empty(pairs, np.float32)
    for t in range(x.shape[0]):
        row = x[t]
        for i in range(pairs):
            angle = np.float32(positions[t]) * frequencies[i]
            cos[i], sin[i] = np.cos(angle), np.sin(angle)
        for h in range(heads):
            for i in range(pairs):
                at = h * D + i * step
                a, b = row[at], row[at + apart]
                row[at], row[at + apart] = a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]


def rotate_(x: Tensor, positions: Tensor, frequencies: Tensor, heads: int, D: int, interleaved: bool) -> None:
    """Turn the pairs of the first `heads` heads of x [T, at least heads * D], which lie half of the turned channels
    apart or side by side, by positions [T] times frequencies [turned / 2]. float32 on a CPU, contiguous."""
    apart, step = (1, 2) if interleaved else (frequencies.shape[0], 1)
    _rotate(x.numpy(), array_of(positions), frequencies.numpy(), heads, D, apart, step)
