"""pLSTM's recurrence in place on a pool of states, for CPUs."""

import numba
import numpy as np
import numpy.typing as npt

from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)
def plstm_step_numba(
    p: Floats,  # [T, H, Y, J, K]
    k: Floats,  # [T, H, M, K]
    w: Floats,  # [T, H, J, M, V]
    transition: Floats,  # [T, H, J, J]
    pool: FlatPool,  # [slots, depths, H, J, K, V]
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, H, Y, V]
) -> None:
    H, Y, J, K = p.shape[1:]
    M, V = w.shape[3], w.shape[4]
    for task in numba.prange(slots.shape[0] * H):
        s, h = task // H, task % H
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride + h * J * K * V
        C = pool.data[base : base + J * K * V]
        new = np.empty((J, V), np.float32)
        for t in range(offsets[s], offsets[s + 1]):
            out[t, h] = 0.0
            for i in range(K):
                for j in range(J):
                    row = C[(j * K + i) * V : (j * K + i + 1) * V]
                    for o in range(Y):
                        y, p_i = out[t, h, o], p[t, h, o, j, i]
                        for x in range(V):
                            y[x] += p_i * row[x]
                for j in range(J):
                    to = new[j]
                    to[:] = 0.0
                    for m in range(M):
                        w_m, k_i = w[t, h, j, m], k[t, h, m, i]
                        for x in range(V):
                            to[x] += k_i * w_m[x]
                    for b in range(J):
                        row, a = C[(b * K + i) * V : (b * K + i + 1) * V], transition[t, h, j, b]
                        for x in range(V):
                            to[x] += a * row[x]
                for j in range(J):
                    C[(j * K + i) * V : (j * K + i + 1) * V] = new[j]
