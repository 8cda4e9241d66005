"""The selective scan in place on a pool of states, for CPUs: the Triton kernel's loops, in numba.

The exponentials dominate: N of them for every channel and token. They are taken here and not by torch, which
would have to write and read N * C floats a token for them.
"""

import numba
import numpy as np
import numpy.typing as npt

from kernels.fastmath import LOG2_E, exp2, silu, wide_vectors
from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CHANNELS = 256  # of one task, where there are few rows to share
MANY, LONG = 8, 2048  # of so many rows a task takes more: long runs of a state are read at twice the speed


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def selective_step_numba(
    x: Floats,  # [T, C]
    dt: Floats,  # [T, C]
    A: Floats,  # [N, C]
    B: Floats,  # [T, N]
    C: Floats,  # [T, N]
    D: Floats,  # [C]
    z: Floats,  # [T, C], or [0, C] for no gate
    pool: FlatPool,
    slots: Ints,  # [S]
    depths: Ints,  # [S]
    offsets: Ints,  # [S + 1]
    out: Floats,  # [T, C]
) -> None:
    N, channels = A.shape
    share = CHANNELS if slots.shape[0] < MANY else LONG
    blocks = (channels + share - 1) // share
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * blocks):
        wide_vectors()
        s, block = task // blocks, task % blocks
        first, last = block * share, min(channels, (block + 1) * share)
        width = last - first
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride
        scratch = np.empty(2 * width, np.float32)
        rate, write = scratch[:width], scratch[width:]
        for t in range(offsets[s], offsets[s + 1]):
            x_t, dt_t, y = x[t, first:last], dt[t, first:last], out[t, first:last]
            for c in range(width):
                rate[c] = dt_t[c] * LOG2_E
                write[c] = dt_t[c] * x_t[c]
                y[c] = D[first + c] * x_t[c]
            for n in range(N):
                h = data[base + n * channels + first : base + n * channels + last]
                a, b_n, c_n = A[n, first:last], B[t, n], C[t, n]
                for c in range(width):
                    new = exp2(rate[c] * a[c]) * h[c] + b_n * write[c]
                    h[c] = new
                    y[c] += c_n * new
            if z.shape[0] > 0:
                z_t = z[t, first:last]
                for c in range(width):
                    y[c] *= silu(z_t[c])
