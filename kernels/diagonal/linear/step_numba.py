"""Linear recurrences with a given decay in place on a pool of states, for CPUs: the Triton kernel's three
branches, in numba."""

import numba
import numpy as np
import numpy.typing as npt

from kernels.fastmath import exp, wide_vectors
from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CHANNELS = 512  # of one task


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def gated_step_numba(
    u: Floats,  # [T, C]
    g: Floats,  # [T, C]
    pool: FlatPool,  # [slots, depths, C]
    slots: Ints,  # [S]
    depths: Ints,  # [S]
    offsets: Ints,  # [S + 1]
    out: Floats,  # [T, C]
) -> None:
    C = u.shape[1]
    blocks = (C + CHANNELS - 1) // CHANNELS
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * blocks):
        wide_vectors()
        s, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride
        h = data[base + first : base + last]
        for t in range(offsets[s], offsets[s + 1]):
            u_t, g_t, y = u[t, first:last], g[t, first:last], out[t, first:last]
            for c in range(last - first):
                new = exp(g_t[c]) * h[c] + u_t[c]
                h[c] = new
                y[c] = new


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def lru_step_numba(
    u: Floats,  # [T, 2, C]
    lam: Floats,  # [2, C]
    pool: FlatPool,  # [slots, depths, 2, C]
    slots: Ints,  # [S]
    depths: Ints,  # [S]
    offsets: Ints,  # [S + 1]
    out: Floats,  # [T, 2, C]
) -> None:
    C = u.shape[2]
    blocks = (C + CHANNELS - 1) // CHANNELS
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * blocks):
        s, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride
        re, im = data[base + first : base + last], data[base + C + first : base + C + last]
        a, b = lam[0, first:last], lam[1, first:last]
        for t in range(offsets[s], offsets[s + 1]):
            u_re, u_im = u[t, 0, first:last], u[t, 1, first:last]
            y_re, y_im = out[t, 0, first:last], out[t, 1, first:last]
            for c in range(last - first):
                new_re = a[c] * re[c] - b[c] * im[c] + u_re[c]
                new_im = a[c] * im[c] + b[c] * re[c] + u_im[c]
                re[c], im[c] = new_re, new_im
                y_re[c], y_im[c] = new_re, new_im


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def s4d_step_numba(
    u: Floats,  # [T, C]
    lam: Floats,  # [2, N, C]
    read: Floats,  # [2, N, C]
    skip: Floats,  # [C]
    pool: FlatPool,  # [slots, depths, 2, N, C]
    slots: Ints,  # [S]
    depths: Ints,  # [S]
    offsets: Ints,  # [S + 1]
    out: Floats,  # [T, C]
) -> None:
    N, C = lam.shape[1], lam.shape[2]
    blocks = (C + CHANNELS - 1) // CHANNELS
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * blocks):
        s, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride + first
        for t in range(offsets[s], offsets[s + 1]):
            u_t, y = u[t, first:last], out[t, first:last]
            for c in range(last - first):
                y[c] = skip[first + c] * u_t[c]
            for n in range(N):
                re = data[base + n * C : base + n * C + last - first]
                im = data[base + (N + n) * C : base + (N + n) * C + last - first]
                a, b = lam[0, n, first:last], lam[1, n, first:last]
                p, q = read[0, n, first:last], read[1, n, first:last]
                for c in range(last - first):
                    new_re = a[c] * re[c] - b[c] * im[c] + u_t[c]
                    new_im = a[c] * im[c] + b[c] * re[c]
                    re[c], im[c] = new_re, new_im
                    y[c] += np.float32(2.0) * (p[c] * new_re - q[c] * new_im)
