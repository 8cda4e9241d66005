"""The self-referential weight matrix in place on a pool of states, for CPUs: the Triton kernel's loops, in
numba."""

import numba
import numpy as np
import numpy.typing as npt

from kernels.fastmath import exp, sigmoid, wide_vectors
from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

ZERO = np.float32(0.0)


@numba.njit(fastmath=True, error_model="numpy", nogil=True)
def _product(S: Floats, W: Floats, x: Floats, y: Floats) -> None:
    """y = (S + W)^T x: S flat [D * R], W [D, R], x [D], y [R]."""
    wide_vectors()
    R = y.shape[0]
    y[:] = ZERO
    for i in range(x.shape[0]):
        row, base, x_i = S[i * R : (i + 1) * R], W[i], x[i]
        for j in range(R):
            y[j] += x_i * (row[j] + base[j])


@numba.njit(fastmath=True, error_model="numpy", nogil=True)
def _softmax(x: Floats) -> None:
    highest, total = x.max(), ZERO
    for i in range(x.shape[0]):
        x[i] = exp(x[i] - highest)
        total += x[i]
    for i in range(x.shape[0]):
        x[i] /= total


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def srwm_step_numba(
    x: Floats,  # [T, H, D]
    weight: Floats,  # [H, D, R]
    pool: FlatPool,  # [slots, depths, H, D, R]
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, H, E]
) -> None:
    H, D, R = weight.shape
    E = out.shape[2]
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * H):
        wide_vectors()
        s, h = task // H, task % H
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride + h * D * R
        S, W = data[base : base + D * R], weight[h]
        scratch = np.empty(2 * R, np.float32)
        now, change = scratch[:R], scratch[R:]
        q, k = now[E : E + D], now[E + D : E + 2 * D]
        for t in range(offsets[s], offsets[s + 1]):
            _product(S, W, x[t, h], now)
            out[t, h, :] = now[:E]
            _softmax(q)
            _softmax(k)
            for i in range(D):
                q[i] -= k[i]
            _product(S, W, q, change)
            for block in range(4):
                first = 0 if block == 0 else E + (block - 1) * D
                last = R if block == 3 else E + block * D
                rate = sigmoid(now[R - 4 + block])
                for j in range(first, last):
                    change[j] *= rate
            for i in range(D):
                row, k_i = S[i * R : (i + 1) * R], k[i]
                for j in range(R):
                    row[j] += k_i * change[j]
