"""A state that is the last inputs: short causal convolutions before a recurrence, and dilated ones."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.conv.naive import conv_naive
from kernels.conv.ring import conv_ring
from kernels.conv.scan import conv_scan, taps_scan
from kernels.conv.step_numba import conv_step_numba
from kernels.library import define
from kernels.pool import array_of, as_float32, flat

__all__ = ["conv", "conv_naive", "conv_ring", "conv_scan", "conv_step", "conv_taps", "taps_scan"]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    silu: bool,
    dilation: int = 1,
    cursor_pool: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution of packed x [T, C] with weight [C, W] and bias [C], then SiLU if asked ->
    [T, C].

    With a pool [slots, depths, (W - 1) * dilation, C] each segment goes on where its last inputs left off,
    and leaves its own; without one it begins with zeros, and the result is differentiable. The pool is a
    shift register, the oldest input first; with a cursor_pool [slots, depths, 1], as a dilation needs, it is
    a ring.
    """
    if pool is None:
        zero = x.new_zeros(
            len(offsets) - 1, (weight.shape[1] - 1) * dilation, x.shape[1], dtype=torch.float32
        )
        y = conv_scan(x, weight, bias, zero, offsets, dilation)[0].to(x.dtype)
        return F.silu(y) if silu else y
    _check(pool, weight.shape[1], dilation, cursor_pool)
    if cursor_pool is None or pool.shape[2] == 0:
        return conv_step(x, weight, bias, pool, slots, depths, offsets, silu)
    return conv_ring(x, weight, bias, pool, cursor_pool, slots, depths, offsets, dilation, silu)


def conv_taps(
    x: Tensor,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    width: int,
    dilation: int = 1,
    cursor_pool: Tensor | None = None,
) -> Tensor:
    """What each token of a causal convolution sees: packed x [T, C] -> [T, W, C], oldest first. A full
    convolution (every output channel from every input channel) is a projection of that. Pools as in `conv`,
    always a ring."""
    if width < 2:
        raise ValueError(
            f"width: {width} is less than 2; without taps in the past there is nothing to remember"
        )
    if pool is None:
        zero = x.new_zeros(len(offsets) - 1, (width - 1) * dilation, x.shape[1], dtype=torch.float32)
        return taps_scan(x, zero, offsets, width, dilation)[0].to(x.dtype)
    if cursor_pool is None:
        raise ValueError("cursor_pool: needed, the pool is a ring")
    _check(pool, width, dilation, cursor_pool)
    return conv_ring(x, None, None, pool, cursor_pool, slots, depths, offsets, dilation, False)


def _check(pool: Tensor, width: int, dilation: int, cursor_pool: Tensor | None) -> None:
    if pool.shape[2] != (width - 1) * dilation:
        needed = (width - 1) * dilation
        raise ValueError(f"pool: {pool.shape[2]} inputs, {width} taps and dilation {dilation} need {needed}")
    if dilation > 1 and cursor_pool is None:
        raise ValueError(f"cursor_pool: needed with a dilation of {dilation}, the pool is a ring")


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    silu: bool,
) -> Tensor:
    out = np.empty(x.shape, np.float32)
    taps = as_float32(weight.t())
    conv_step_numba(
        as_float32(x),
        taps,
        np.zeros(x.shape[1], np.float32) if bias is None else as_float32(bias),
        flat(pool),
        array_of(slots),
        array_of(depths),
        array_of(offsets),
        out,
        silu,
    )
    return torch.from_numpy(out).to(x.dtype)


def _on_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    silu: bool,
) -> Tensor:
    import triton

    from kernels.conv.step_triton import conv_step_kernel

    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    C, W = weight.shape
    block = 256
    conv_step_kernel[(triton.cdiv(C, block), slots.shape[0])](
        x, weight, weight if bias is None else bias, pool, slots, depths, offsets, out,
        pool.stride(0), pool.stride(1), C,
        W=W, BLOCK_W=triton.next_power_of_2(W), BLOCK_C=block, BIAS=bias is not None, SILU=silu, num_warps=4,
    )  # fmt: skip
    return out


def _shape_only(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    silu: bool,
) -> Tensor:
    return torch.empty_like(x)


conv_step = define(
    "conv_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) pool, Tensor slots, Tensor depths, "
    "Tensor offsets, bool silu) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
