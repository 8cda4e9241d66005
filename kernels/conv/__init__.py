"""A state that is a shift register: the short causal convolutions before a recurrence."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.conv.naive import conv_naive
from kernels.conv.scan import conv_scan
from kernels.conv.step_numba import conv_step_numba
from kernels.library import define
from kernels.pool import as_float32, flat

__all__ = ["conv", "conv_naive", "conv_scan", "conv_step"]


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
) -> Tensor:
    """Depthwise causal convolution of packed x [T, C] with weight [C, W] and bias [C], then SiLU if asked ->
    [T, C].

    With a pool [slots, depths, W - 1, C] each segment goes on where its last inputs left off, and leaves its
    own; without one it begins with zeros, and the result is differentiable.
    """
    if pool is None:
        zero = x.new_zeros(len(offsets) - 1, weight.shape[1] - 1, x.shape[1], dtype=torch.float32)
        y = conv_scan(x, weight, bias, zero, offsets)[0].to(x.dtype)
        return F.silu(y) if silu else y
    return conv_step(x, weight, bias, pool, slots, depths, offsets, silu)


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
        slots.numpy(),
        depths.numpy(),
        offsets.numpy(),
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
