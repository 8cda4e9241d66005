"""The outer-product recurrence in place on a pool of states, for CPUs: the Triton kernel's loops, in numba."""

import numba
import numpy as np
import numpy.typing as npt

from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)  # type: ignore[misc]
def outer_step_numba(
    q: Floats,  # [T, Hq, K]
    k: Floats,  # [T, Hk, K]
    v: Floats,  # [T, Hv, V]
    decay: Floats,  # exp of the log decay: [T, Hg, K], [T, Hg, 1], or [0, 1, 1] for none
    bonus: Floats,  # [H, K], or [0, 0] for none
    pool: FlatPool,
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, Ho, V]
    H: int,
    scale: float,
) -> None:
    segments, K, V = slots.shape[0], k.shape[2], v.shape[2]
    Hq, Hk, Hv, Hg, Ho = q.shape[1], k.shape[1], v.shape[1], decay.shape[1], out.shape[1]
    decays, per_channel, has_bonus = decay.shape[0] > 0, decay.shape[2] > 1, bonus.shape[0] > 0
    reads = Ho // H
    for task in numba.prange(segments * H):
        s, h = task // H, task % H
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride + h * K * V
        S = pool.data[base : base + K * V]
        hk, hv, hg = h * Hk // H, h * Hv // H, h * Hg // H
        for t in range(offsets[s], offsets[s + 1]):
            v_t = v[t, hv]
            for r in range(reads):
                out[t, h * reads + r, :] = 0.0
            for i in range(K):
                k_i = k[t, hk, i]
                a = np.float32(1.0)
                if decays:
                    a = decay[t, hg, i if per_channel else 0]
                row = S[i * V : (i + 1) * V]
                if reads == 1:
                    q_i = q[t, h * Hq // Ho, i] * scale
                    o = out[t, h]
                    if has_bonus:
                        u_i = bonus[h, i] * k_i
                        for j in range(V):
                            o[j] += q_i * (row[j] + u_i * v_t[j])
                            row[j] = a * row[j] + k_i * v_t[j]
                    else:
                        for j in range(V):
                            x = a * row[j] + k_i * v_t[j]
                            row[j] = x
                            o[j] += q_i * x
                else:
                    u_i = bonus[h, i] * k_i if has_bonus else k_i
                    b = np.float32(1.0) if has_bonus else a
                    for r in range(reads):
                        ho = h * reads + r
                        q_i = q[t, ho * Hq // Ho, i] * scale
                        o = out[t, ho]
                        for j in range(V):
                            o[j] += q_i * (b * row[j] + u_i * v_t[j])
                    for j in range(V):
                        row[j] = a * row[j] + k_i * v_t[j]
