"""The short convolution in place on a pool of states, for CPUs."""

import numba
import numpy as np
import numpy.typing as npt

from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CHANNELS = 512  # of one task


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)
def conv_step_numba(
    x: Floats,  # [T, C]
    taps: Floats,  # [W, C]: the weight, transposed
    bias: Floats,  # [C]
    pool: FlatPool,
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, C]
    silu: bool,
) -> None:
    C, W = x.shape[1], taps.shape[0]
    blocks = (C + CHANNELS - 1) // CHANNELS
    for task in numba.prange(slots.shape[0] * blocks):
        s, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride
        state = pool.data[base : base + (W - 1) * C]
        for t in range(offsets[s], offsets[s + 1]):
            y, now = out[t, first:last], x[t, first:last]
            for c in range(last - first):
                y[c] = bias[first + c] + taps[W - 1, first + c] * now[c]
            for w in range(W - 1):
                old = state[w * C + first : w * C + last]
                for c in range(last - first):
                    y[c] += taps[w, first + c] * old[c]
            for w in range(W - 2):
                state[w * C + first : w * C + last] = state[(w + 1) * C + first : (w + 1) * C + last]
            if W > 1:
                state[(W - 2) * C + first : (W - 2) * C + last] = now
            if silu:
                for c in range(last - first):
                    y[c] = y[c] / (np.float32(1.0) + np.exp(-y[c]))
