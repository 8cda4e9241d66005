"""The causal convolution in place on a pool of states, for CPUs: on a shift register and on a ring."""

import numba
import numpy as np
import numpy.typing as npt

from kernels.fastmath import silu as silu_of
from kernels.fastmath import wide_vectors
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
    data = pool.data  # before the loop: numba takes a write through a member of a tuple for dead
    for task in numba.prange(slots.shape[0] * blocks):
        wide_vectors()
        s, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        width = last - first
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride + first
        for t in range(offsets[s], offsets[s + 1]):
            y, now = out[t, first:last], x[t, first:last]
            newest, start = taps[W - 1, first:last], bias[first:last]
            for c in range(width):
                y[c] = start[c] + newest[c] * now[c]
            for w in range(W - 1):
                tap, old = taps[w, first:last], data[base + w * C : base + w * C + width]
                if w < W - 2:
                    next_ = data[base + (w + 1) * C : base + (w + 1) * C + width]
                    for c in range(width):
                        y[c] += tap[c] * old[c]
                        old[c] = next_[c]
                else:
                    for c in range(width):
                        y[c] += tap[c] * old[c]
                        old[c] = now[c]
            if silu:
                for c in range(width):
                    y[c] = silu_of(y[c])


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)
def ring_step_numba(
    x: Floats,  # [T, C]
    taps: Floats,  # [W, C]; [0, C] to hand out what each token sees
    bias: Floats,  # [C]
    data: Floats,  # the flat array of pool: numba drops stores into a tuple's member that it never sees read
    pool: FlatPool,  # [slots, depths, R, C]
    cursor_data: Floats,
    cursor_pool: FlatPool,  # [slots, depths, 1]: where the oldest input lies, and the next will
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, 1, C], or what each token sees [T, W, C]
    R: int,  # (W - 1) * dilation
    dilation: int,
    silu: bool,
) -> None:
    C, W = x.shape[1], R // dilation + 1
    blocks = (C + CHANNELS - 1) // CHANNELS
    cursors = np.empty(slots.shape[0], np.int64)
    for s in range(slots.shape[0]):
        at = cursor_pool.offset + slots[s] * cursor_pool.slot_stride + depths[s] * cursor_pool.depth_stride
        cursors[s] = np.int64(cursor_data[at])
        cursor_data[at] = np.float32((cursors[s] + offsets[s + 1] - offsets[s]) % R)
    for task in numba.prange(slots.shape[0] * blocks):
        s, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride
        cursor = cursors[s]
        for t in range(offsets[s], offsets[s + 1]):
            now = x[t, first:last]
            for w in range(W):
                at = base + (cursor + w * dilation) % R * C
                old = data[at + first : at + last] if w < W - 1 else now
                if taps.shape[0] == 0:
                    out[t, w, first:last] = old
                    continue
                y = out[t, 0, first:last]
                if w == 0:
                    y[:] = bias[first:last]
                for c in range(last - first):
                    y[c] += taps[w, first + c] * old[c]
            if silu:
                y = out[t, 0, first:last]
                for c in range(last - first):
                    y[c] = silu_of(y[c])
            at = base + cursor * C
            data[at + first : at + last] = now
            cursor = (cursor + 1) % R
