"""The delta rule and its general form in place on a pool of states, for CPUs: the Triton kernel's loops, in
numba.

A token takes two passes over a head's state. The first only reads: the sums for the value to erase and for
the output. The second decays and writes. What differs between the variants is prepared in vectors of length
K.
"""

import numba
import numpy as np
import numpy.typing as npt

from kernels.fastmath import wide_vectors
from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

ZERO, ONE = np.float32(0.0), np.float32(1.0)


@numba.njit(fastmath=True, error_model="numpy", nogil=True)
def _read(S: Floats, x: Floats, y: Floats, p: Floats, o: Floats) -> None:
    """p = S^T x, o = S^T y: S flat [K * V], x, y [K], p, o [V]. Two rows at a time, which halves the traffic
    of the sums."""
    K, V = x.shape[0], p.shape[0]
    wide_vectors()
    p[:] = ZERO
    o[:] = ZERO
    for i in range(0, K - 1, 2):
        r0, r1 = S[i * V : (i + 1) * V], S[(i + 1) * V : (i + 2) * V]
        x0, x1, y0, y1 = x[i], x[i + 1], y[i], y[i + 1]
        for j in range(V):
            p[j] += x0 * r0[j] + x1 * r1[j]
            o[j] += y0 * r0[j] + y1 * r1[j]
    if K % 2:
        row = S[(K - 1) * V : K * V]
        for j in range(V):
            p[j] += x[K - 1] * row[j]
            o[j] += y[K - 1] * row[j]


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def delta_step_numba(
    q: Floats,  # [T, Hq, K]
    k: Floats,  # [T, Hk, K]
    v: Floats,  # [T, H, V]
    beta: Floats,  # [T, H], or [0, H] for the general form
    decay: Floats,  # exp of the log decay: [T, Hg, K], [T, Hg, 1], or [0, 1, 1] for none
    a: Floats,  # [T, H, K], or [0, 1, 1] for the delta rule
    b: Floats,  # as a
    pool: FlatPool,
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, H, V]
    scale: float,
) -> None:
    H, K, V = v.shape[1], k.shape[2], v.shape[2]
    Hq, Hk, Hg = q.shape[1], k.shape[1], decay.shape[1]
    decays, per_channel, general = decay.shape[0] > 0, decay.shape[2] > 1, a.shape[0] > 0
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * H):
        wide_vectors()
        s, h = task // H, task % H
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride + h * K * V
        S = data[base : base + K * V]
        scratch = np.empty(3 * K + V, np.float32)
        d, x, y, p = scratch[:K], scratch[K : 2 * K], scratch[2 * K : 3 * K], scratch[3 * K :]
        hq, hk, hg = h * Hq // H, h * Hk // H, h * Hg // H
        for t in range(offsets[s], offsets[s + 1]):
            q_t, k_t, v_t, o = q[t, hq], k[t, hk], v[t, h], out[t, h]
            for i in range(K):
                d[i] = decay[t, hg, i if per_channel else 0] if decays else ONE
                y[i] = d[i] * q_t[i] * scale
            own = ZERO
            for i in range(K):
                own += k_t[i] * q_t[i] * scale
            if general:
                a_t, b_t = a[t, h], b[t, h]
                _read(S, a_t, y, p, o)
                across = ZERO
                for i in range(K):
                    across += b_t[i] * q_t[i] * scale
                for j in range(V):
                    o[j] += across * p[j] + own * v_t[j]
                for i in range(K):
                    row, d_i, k_i, b_i = S[i * V : (i + 1) * V], d[i], k_t[i], b_t[i]
                    for j in range(V):
                        row[j] = d_i * row[j] + b_i * p[j] + k_i * v_t[j]
            else:
                for i in range(K):
                    x[i] = d[i] * k_t[i]
                _read(S, x, y, p, o)
                for j in range(V):
                    p[j] = beta[t, h] * (v_t[j] - p[j])
                    o[j] += own * p[j]
                for i in range(K):
                    row, d_i, k_i = S[i * V : (i + 1) * V], d[i], k_t[i]
                    for j in range(V):
                        row[j] = d_i * row[j] + k_i * p[j]
