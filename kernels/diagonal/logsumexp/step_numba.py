"""Softmax averages in place on a pool of states, for CPUs. The Triton kernel's two branches are two functions
here: of RWKV-4 the vectorised loop runs over the heads, which are single channels, of Aaren over the values
of one head.

Of the two factors e^{m - max} and e^{s - max} one is always 1: a single exponential of -|m - s| gives both.
"""

import numba
import numpy as np
import numpy.typing as npt

from kernels.fastmath import exp, wide_vectors
from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CHANNELS = 256  # of one task
ONE, ZERO, NOTHING = np.float32(1.0), np.float32(0.0), np.float32(-1e30)


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def aaren_step_numba(
    s: Floats,  # [T, H]
    v: Floats,  # [T, H, V]
    pool: FlatPool,  # [slots, depths, H * (V + 2)]
    slots: Ints,  # [S]
    depths: Ints,  # [S]
    offsets: Ints,  # [S + 1]
    out: Floats,  # [T, H, V]
) -> None:
    H, V = v.shape[1], v.shape[2]
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * H):
        segment, h = task // H, task % H
        base = pool.offset + slots[segment] * pool.slot_stride + depths[segment] * pool.depth_stride
        a = data[base + h * V : base + (h + 1) * V]
        at_c, at_m = base + H * V + h, base + H * V + H + h
        c, m = data[at_c], data[at_m]
        for t in range(offsets[segment], offsets[segment + 1]):
            scale = NOTHING if c == ZERO else m
            ahead = scale - s[t, h]
            e = exp(-abs(ahead))
            old, new = (ONE, e) if ahead >= ZERO else (e, ONE)
            c = c * old + new
            m = scale if ahead >= ZERO else s[t, h]
            v_t, o = v[t, h], out[t, h]
            inverse = ONE / c
            for j in range(V):
                x = a[j] * old + v_t[j] * new
                a[j] = x
                o[j] = x * inverse
        data[at_c], data[at_m] = c, m


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def wkv_step_numba(
    k: Floats,  # [T, C]
    v: Floats,  # [T, C]
    w: Floats,  # [C]
    u: Floats,  # [C]
    pool: FlatPool,  # [slots, depths, 3, C]
    slots: Ints,  # [S]
    depths: Ints,  # [S]
    offsets: Ints,  # [S + 1]
    out: Floats,  # [T, C]
) -> None:
    C = k.shape[1]
    blocks = (C + CHANNELS - 1) // CHANNELS
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * blocks):
        wide_vectors()
        segment, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        base = pool.offset + slots[segment] * pool.slot_stride + depths[segment] * pool.depth_stride
        a = data[base + first : base + last]
        c = data[base + C + first : base + C + last]
        m = data[base + 2 * C + first : base + 2 * C + last]
        decay, bonus = w[first:last], u[first:last]
        for t in range(offsets[segment], offsets[segment + 1]):
            k_t, v_t, o = k[t, first:last], v[t, first:last], out[t, first:last]
            for i in range(last - first):
                scale = NOTHING if c[i] == ZERO else m[i]
                ahead = scale - (bonus[i] + k_t[i])
                e = exp(-abs(ahead))
                old = ONE if ahead >= ZERO else e
                new = e if ahead >= ZERO else ONE
                o[i] = (a[i] * old + v_t[i] * new) / (c[i] * old + new)
                scale += decay[i]
                ahead = scale - k_t[i]
                e = exp(-abs(ahead))
                old = ONE if ahead >= ZERO else e
                new = e if ahead >= ZERO else ONE
                a[i] = a[i] * old + v_t[i] * new
                c[i] = c[i] * old + new
                m[i] = scale if ahead >= ZERO else k_t[i]
