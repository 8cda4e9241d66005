"""The selective scan and its gradient on a CPU, for training.

With dh the gradient of h_t, to which y_t = C_t . h_t adds C_t dy_t, and e_t = exp(dt_t A):

    dC = dy h_t,  dB = dh (dt x),  d(dt x) = dh B,  d(dt A) = dh e_t h_{t-1},  gradient of h_{t-1} = e_t dh,

where dB and dC sum over the channels and the others over what they broadcast to. The states that this needs
are not kept for every token: the forward pass keeps each SPAN-th, and the backward pass makes the ones
between again, a block of channels at a time, which fits into the cache. Against the scan and its gradient
this takes an eighth of the time.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fastmath import LOG2_E, exp2, wide_vectors
from kernels.pool import as_float32

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SPAN = 16
CHANNELS = 64  # of one task
ZERO = np.float32(0.0)


@numba.njit(fastmath=True, error_model="numpy", nogil=True)
def _decay(dt: Floats, A: Floats, e: Floats) -> None:
    """e = exp(dt A): dt [c], A [N, c], e [N, c]."""
    wide_vectors()
    for n in range(A.shape[0]):
        a, e_n = A[n], e[n]
        for c in range(dt.shape[0]):
            e_n[c] = exp2(LOG2_E * dt[c] * a[c])


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def _forward(
    x: Floats,  # [T, C], as dt
    dt: Floats,
    A: Floats,  # [N, C]
    B: Floats,  # [T, N], as R
    R: Floats,
    offsets: Ints,
    kept_at: Ints,  # [S]: where the kept states of each segment begin
    kept: Floats,  # [.., N, C], written
    out: Floats,  # [T, C], written
) -> None:
    N, C = A.shape
    blocks = (C + CHANNELS - 1) // CHANNELS
    for task in numba.prange((len(offsets) - 1) * blocks):
        wide_vectors()
        s, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        width = last - first
        rate = np.ascontiguousarray(A[:, first:last])
        h, e = np.zeros((N, width), np.float32), np.empty((N, width), np.float32)
        for t in range(offsets[s], offsets[s + 1]):
            since = t - offsets[s]
            if since % SPAN == 0:
                kept[kept_at[s] + since // SPAN, :, first:last] = h
            x_t, dt_t, y = x[t, first:last], dt[t, first:last], out[t, first:last]
            _decay(dt_t, rate, e)
            y[:] = ZERO
            for n in range(N):
                h_n, e_n, b, r = h[n], e[n], B[t, n], R[t, n]
                for c in range(width):
                    new = e_n[c] * h_n[c] + b * (dt_t[c] * x_t[c])
                    h_n[c] = new
                    y[c] += r * new


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def _backward(
    x: Floats,
    dt: Floats,
    A: Floats,
    B: Floats,
    R: Floats,
    offsets: Ints,
    kept_at: Ints,
    kept: Floats,
    dy: Floats,  # [T, C]
    dx: Floats,  # [T, C]; this and the following are written
    ddt: Floats,  # [T, C]
    dA: Floats,  # [S, N, C]: of each segment
    dB: Floats,  # [blocks, T, N]: of each block of channels
    dR: Floats,  # as dB
) -> None:
    N, C = A.shape
    blocks = (C + CHANNELS - 1) // CHANNELS
    for task in numba.prange((len(offsets) - 1) * blocks):
        wide_vectors()
        s, block = task // blocks, task % blocks
        first, last = block * CHANNELS, min(C, (block + 1) * CHANNELS)
        width = last - first
        rate = np.ascontiguousarray(A[:, first:last])
        h, e = np.empty((SPAN + 1, N, width), np.float32), np.empty((SPAN, N, width), np.float32)
        dh, drate = np.zeros((N, width), np.float32), np.zeros((N, width), np.float32)
        dw = np.empty(width, np.float32)
        spans = (offsets[s + 1] - offsets[s] + SPAN - 1) // SPAN
        for span in range(spans - 1, -1, -1):
            begin = offsets[s] + span * SPAN
            end = min(begin + SPAN, offsets[s + 1])
            h[0] = kept[kept_at[s] + span, :, first:last]
            for t in range(begin, end):
                x_t, dt_t = x[t, first:last], dt[t, first:last]
                _decay(dt_t, rate, e[t - begin])
                for n in range(N):
                    was, now, e_n, b = h[t - begin, n], h[t - begin + 1, n], e[t - begin, n], B[t, n]
                    for c in range(width):
                        now[c] = e_n[c] * was[c] + b * (dt_t[c] * x_t[c])
            for t in range(end - 1, begin - 1, -1):
                x_t, dt_t, dy_t = x[t, first:last], dt[t, first:last], dy[t, first:last]
                dx_t, ddt_t = dx[t, first:last], ddt[t, first:last]
                dw[:] = ZERO
                ddt_t[:] = ZERO
                for n in range(N):
                    was, now, e_n, a = h[t - begin, n], h[t - begin + 1, n], e[t - begin, n], rate[n]
                    dh_n, da, b, r = dh[n], drate[n], B[t, n], R[t, n]
                    sum_b, sum_r = ZERO, ZERO
                    for c in range(width):
                        g = dh_n[c] + r * dy_t[c]
                        sum_r += dy_t[c] * now[c]
                        sum_b += g * (dt_t[c] * x_t[c])
                        dw[c] += g * b
                        g *= e_n[c]
                        dh_n[c] = g
                        de = g * was[c]
                        ddt_t[c] += de * a[c]
                        da[c] += de * dt_t[c]
                    dB[block, t, n], dR[block, t, n] = sum_b, sum_r
                for c in range(width):
                    ddt_t[c] += dw[c] * x_t[c]
                    dx_t[c] = dw[c] * dt_t[c]
        dA[s, :, first:last] = drate


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, offsets: Tensor) -> Tensor:
        inputs = [i.detach().float().contiguous() for i in (x, dt, A, B, C)]
        spans = (offsets.diff() + SPAN - 1) // SPAN
        kept = torch.empty(int(spans.sum()), *A.shape)
        more = [offsets, spans.cumsum(0) - spans, kept]
        out = torch.empty_like(inputs[0])
        _forward(*(i.numpy() for i in (*inputs, *more, out)))
        ctx.save_for_backward(*inputs, *more)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, _, A, B, _, offsets, *_ = ctx.saved_tensors
        blocks = -(-x.shape[1] // CHANNELS)
        dx, ddt = torch.empty_like(x), torch.empty_like(x)
        dA = A.new_empty(len(offsets) - 1, *A.shape)
        dB, dR = B.new_empty(blocks, *B.shape), B.new_empty(blocks, *B.shape)
        arrays = [i.numpy() for i in ctx.saved_tensors]
        _backward(*arrays, as_float32(grads[0]), *(i.numpy() for i in (dx, ddt, dA, dB, dR)))
        return dx, ddt, dA.sum(0), dB.sum(0), dR.sum(0), None


def selective_train(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    """As `selective_scan` from zero states: packed x, dt, z [T, C], A [N, C], B, C [T, N], D [C] -> y [T, C],
    float32."""
    y: Tensor = _Selective.apply(x, dt, A, B, C, offsets)
    if D is not None:
        y = y + D.float() * x.float()
    return y if z is None else y * F.silu(z.float())
