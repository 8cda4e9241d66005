"""A dilated convolution's state: a ring of its last (W - 1) * dilation inputs and a cursor.

Shifting that many inputs at every token would move the whole state; a ring writes one. The cursor, float32
like every state, says where the oldest input lies, which is where the next one goes.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.conv.step_numba import ring_step_numba
from kernels.library import define
from kernels.pool import array_of, as_float32, flat


def _on_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pool: Tensor,
    cursor_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    dilation: int,
    silu: bool,
) -> Tensor:
    (T, C), R = x.shape, pool.shape[2]
    out = np.empty((T, 1 if weight is not None else R // dilation + 1, C), np.float32)
    flat_pool, flat_cursor = flat(pool), flat(cursor_pool)
    ring_step_numba(
        as_float32(x),
        np.zeros((0, C), np.float32) if weight is None else as_float32(weight.t()),
        np.zeros(C, np.float32) if bias is None else as_float32(bias),
        flat_pool.data,
        flat_pool,
        flat_cursor.data,
        flat_cursor,
        array_of(slots),
        array_of(depths),
        array_of(offsets),
        out,
        R,
        dilation,
        silu,
    )
    return torch.from_numpy(out if weight is None else out[:, 0]).to(x.dtype)


def _on_gpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pool: Tensor,
    cursor_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    dilation: int,
    silu: bool,
) -> Tensor:
    import triton

    from kernels.conv.step_triton import ring_append_kernel, ring_read_kernel

    x = x.contiguous()
    out = _shape_only(x, weight, bias, pool, cursor_pool, slots, depths, offsets, dilation, silu)
    (T, C), N, R = x.shape, slots.shape[0], pool.shape[2]
    W = R // dilation + 1
    if N == 0:
        return out
    cursors = torch.empty(N, dtype=torch.int64, device=x.device)
    strides = pool.stride(0), pool.stride(1), cursor_pool.stride(0), cursor_pool.stride(1)
    block = 256
    # Where every segment has a token, none has more than T - N + 1; programs stride on where one has.
    grid = triton.cdiv(C, block), N, max(1, min(64, T - N + 1))
    ring_read_kernel[grid](
        x, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(),
        pool, cursor_pool, slots, depths, offsets, cursors, out, *strides, C,
        W=W, DILATION=dilation, BLOCK_W=triton.next_power_of_2(W), BLOCK_C=block,
        BIAS=bias is not None, SILU=silu, TAPS=weight is None, num_warps=4,
    )  # fmt: skip
    ring_append_kernel[grid[:2]](
        x, pool, cursor_pool, slots, depths, offsets, cursors, *strides, C, R=R, BLOCK_C=block, num_warps=4
    )
    return out


def _shape_only(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pool: Tensor,
    cursor_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    dilation: int,
    silu: bool,
) -> Tensor:
    T, C = x.shape
    return x.new_empty(T, C) if weight is not None else x.new_empty(T, pool.shape[2] // dilation + 1, C)


conv_ring = define(
    "conv_ring(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) pool, Tensor(b!) cursor_pool, "
    "Tensor slots, Tensor depths, Tensor offsets, int dilation, bool silu) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
