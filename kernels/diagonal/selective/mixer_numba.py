"""The whole mixer of Mamba for decoding rows, in one call from Python: projections, convolution, recurrence, gate.

A step of one row is some 25 small operations a layer. From Python each costs what a row's arithmetic does; here they
are calls of compiled code, one after the other, on memory that stays in the core's cache.
"""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from kernels.conv.step_numba import conv_step_numba
from kernels.diagonal.selective.step_numba import selective_step_numba
from kernels.fastmath import softplus, wide_vectors
from kernels.linear.blocks_numba import Matrix, project
from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class MixerWeights(NamedTuple):
    """C channels, N of state, R of the low-rank step size, W taps, D wide outside."""

    in_proj: Matrix  # [2 C, D]: x, then the gate z
    taps: Floats  # [W, C]
    taps_bias: Floats  # [C]
    x_proj: Matrix  # [R + 2 N, C]: the step size, B, C
    dt_proj: Matrix  # [C, R]
    A: Floats  # [N, C]
    skip: Floats  # [C]
    out_proj: Matrix  # [D, C]
    rank: int  # R


# Copies that are never read from numba's cache on disk. Compiled against originals that were both read from there,
# `mixer_step_numba` worked, and crashed every later process, which read it from there itself (numba 0.68).
_conv_step = numba.njit(parallel=True, fastmath=True, nogil=True)(conv_step_numba.py_func)
_selective_step = numba.njit(parallel=True, fastmath=True, error_model="numpy", nogil=True)(
    selective_step_numba.py_func
)


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def softplus_numba(x: Floats) -> None:
    wide_vectors()
    flat = x.reshape(x.size)
    for i in range(flat.size):
        flat[i] = softplus(flat[i])


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def unweighted_rms_norm_numba(x: Floats, eps: float) -> None:
    wide_vectors()
    for t in range(x.shape[0]):
        row = x[t]
        total = np.float32(0)
        for i in range(row.size):
            total += row[i] * row[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(row.size) + eps)
        for i in range(row.size):
            row[i] *= scale


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def mixer_step_numba(
    x: Floats,  # [T, D], a token of each of T sequences
    w: MixerWeights,
    rms_eps: float,  # of norms without weights over step size, B and C; negative for none
    conv_pool: FlatPool,  # [slots, depths, W - 1, C]
    pool: FlatPool,  # [slots, depths, N, C]
    slots: Ints,  # [T]
    depths: Ints,  # [T]
    out: Floats,  # [T, D]
) -> None:
    T = x.shape[0]
    N, C = w.A.shape
    R = w.rank
    offsets = np.arange(T + 1)
    f32 = np.float32
    both, y = np.empty((T, 2 * C), f32), np.empty((T, C), f32)
    project(x, w.in_proj, both)
    u, z = both[:, :C].copy(), both[:, C:].copy()
    _conv_step(u, w.taps, w.taps_bias, conv_pool, slots, depths, offsets, y, True)
    made = np.empty((T, R + 2 * N), f32)
    project(y, w.x_proj, made)
    low, B, read = made[:, :R].copy(), made[:, R : R + N].copy(), made[:, R + N :].copy()
    if rms_eps >= 0:
        for part in (low, B, read):
            unweighted_rms_norm_numba(part, rms_eps)
    dt = np.empty((T, C), f32)
    project(low, w.dt_proj, dt)
    softplus_numba(dt)
    _selective_step(y, dt, w.A, B, read, w.skip, z, pool, slots, depths, offsets, u)
    project(u, w.out_proj, out)
