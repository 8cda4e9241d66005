"""Matrix products with few rows, for CPUs: reading the weights is what takes the time.

BLAS libraries pack the weights first, or go row by row: at 8 rows that takes three to four times as long as
reading the weights once. Here every weight is read once for four rows, and stands in a register for them; those
of eight bits become floats there.
"""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from kernels.fastmath import wide_vectors

Floats = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float32] | npt.NDArray[np.int8]

NONE = np.empty(0, np.float32)


class Matrix(NamedTuple):
    """A projection, as kernels that contain one take it."""

    weight: Weights  # [N, K]
    scale: Floats  # [N], or [0] for none
    bias: Floats  # [N], or [0] for none


CHANNELS = 64  # outputs of one task


# Sixteen sums by name: as an array, or a tuple out of a function, they would not stay in registers.
@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def linear_step_numba(
    x: Floats,  # [T, K]
    weight: Weights,  # [N, K]
    scale: Floats,  # [N], or [0] for none
    bias: Floats,  # [N], or [0] for none
    out: Floats,  # [T, N]
) -> None:
    (T, K), N = x.shape, weight.shape[0]
    for task in numba.prange((N + CHANNELS - 1) // CHANNELS):
        wide_vectors()
        first, last = task * CHANNELS, min(N, (task + 1) * CHANNELS)
        for n in range(first, last, 4):
            # Where fewer than four channels are left, the last is computed again.
            n1, n2, n3 = min(n + 1, last - 1), min(n + 2, last - 1), min(n + 3, last - 1)
            w0, w1, w2, w3 = weight[n], weight[n1], weight[n2], weight[n3]
            for r in range(0, T - 3, 4):
                x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
                a00 = a01 = a02 = a03 = np.float32(0)
                a10 = a11 = a12 = a13 = np.float32(0)
                a20 = a21 = a22 = a23 = np.float32(0)
                a30 = a31 = a32 = a33 = np.float32(0)
                for k in range(K):
                    u0, u1 = np.float32(w0[k]), np.float32(w1[k])
                    u2, u3 = np.float32(w2[k]), np.float32(w3[k])
                    a00 += x0[k] * u0
                    a01 += x0[k] * u1
                    a02 += x0[k] * u2
                    a03 += x0[k] * u3
                    a10 += x1[k] * u0
                    a11 += x1[k] * u1
                    a12 += x1[k] * u2
                    a13 += x1[k] * u3
                    a20 += x2[k] * u0
                    a21 += x2[k] * u1
                    a22 += x2[k] * u2
                    a23 += x2[k] * u3
                    a30 += x3[k] * u0
                    a31 += x3[k] * u1
                    a32 += x3[k] * u2
                    a33 += x3[k] * u3
                y = out[r]
                y[n], y[n1], y[n2], y[n3] = a00, a01, a02, a03
                y = out[r + 1]
                y[n], y[n1], y[n2], y[n3] = a10, a11, a12, a13
                y = out[r + 2]
                y[n], y[n1], y[n2], y[n3] = a20, a21, a22, a23
                y = out[r + 3]
                y[n], y[n1], y[n2], y[n3] = a30, a31, a32, a33
            for r in range(T - T % 4, T):
                x0 = x[r]
                a0 = a1 = a2 = a3 = np.float32(0)
                for k in range(K):
                    a0 += x0[k] * np.float32(w0[k])
                    a1 += x0[k] * np.float32(w1[k])
                    a2 += x0[k] * np.float32(w2[k])
                    a3 += x0[k] * np.float32(w3[k])
                y = out[r]
                y[n], y[n1], y[n2], y[n3] = a0, a1, a2, a3
        for r in range(T):
            y = out[r, first:last]
            if scale.shape[0] > 0:
                for c in range(last - first):
                    y[c] *= scale[first + c]
            if bias.shape[0] > 0:
                for c in range(last - first):
                    y[c] += bias[first + c]
