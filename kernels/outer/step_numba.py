"""The outer-product recurrence in place on a pool of states, for CPUs: the Triton kernels' loops, in
numba."""

import numba
import numpy as np
import numpy.typing as npt

from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)
def outer_step_numba(
    q: Floats,  # [T, Hq, K]
    k: Floats,  # [T, Hk, K]
    v: Floats,  # [T, Hv, V]
    decay: Floats,  # exp of log decay: [T, Hg, K], [T, Hg, 1], [T, Hg, V] (by_value), [0, 1, 1] for none
    bonus: Floats,  # [H, K], or [0, 0] for none
    pool: FlatPool,
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, Ho, V]
    H: int,
    scale: float,
    by_value: bool,
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
                if decays and not by_value:
                    a = decay[t, hg, i if per_channel else 0]
                row = S[i * V : (i + 1) * V]
                if by_value:
                    d = decay[t, hg]
                    for j in range(V):
                        row[j] = d[j] * row[j] + k_i * v_t[j]
                    for r in range(reads):
                        ho = h * reads + r
                        q_i = q[t, ho * Hq // Ho, i] * scale
                        o = out[t, ho]
                        for j in range(V):
                            o[j] += q_i * row[j]
                elif reads == 1:
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


@numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, cache=True, nogil=True)
def mlstm_normalise_numba(
    q: Floats,  # [T, H, K]
    k: Floats,  # [T, H, K]
    i_gate: Floats,  # [T, H], before the exponential
    f_gate: Floats,  # [T, H], before the sigmoid
    n_pool: FlatPool,  # [slots, depths, H, K]
    m_pool: FlatPool,  # [slots, depths, H]
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    q_out: Floats,  # [T, H, K]
    k_out: Floats,  # [T, H, K]
    g_out: Floats,  # [T, H]
    scale: float,
    eps: float,
) -> None:
    H, K = q.shape[1], q.shape[2]
    for task in numba.prange(slots.shape[0] * H):
        s, h = task // H, task % H
        at_m = m_pool.offset + slots[s] * m_pool.slot_stride + depths[s] * m_pool.depth_stride + h
        at_n = n_pool.offset + slots[s] * n_pool.slot_stride + depths[s] * n_pool.depth_stride + h * K
        n = n_pool.data[at_n : at_n + K]
        # Read and written through one slice: numba drops a store into a member of a tuple that it never sees
        # read.
        m_last = m_pool.data[at_m : at_m + 1]
        for t in range(offsets[s], offsets[s + 1]):
            f = f_gate[t, h]
            decayed = m_last[0] + min(f, np.float32(0.0)) - np.log1p(np.exp(-abs(f)))
            m = max(decayed, i_gate[t, h])
            forget, write = np.exp(decayed - m), np.exp(i_gate[t, h] - m)
            k_t, q_t, k_o, q_o = k[t, h], q[t, h], k_out[t, h], q_out[t, h]
            read = np.float32(0.0)
            for i in range(K):
                k_o[i] = write * k_t[i]
                n[i] = forget * n[i] + k_o[i]
                read += q_t[i] * n[i]
            # e^88 is the last power that float32 holds.
            floor = np.exp(min(-m, np.float32(88.0)))
            factor = scale / (max(abs(read * scale), floor) + eps)
            for i in range(K):
                q_o[i] = factor * q_t[i]
            g_out[t, h] = decayed - m
            m_last[0] = m
