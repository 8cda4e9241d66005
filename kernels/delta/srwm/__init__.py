"""The self-referential weight matrix: a layer whose weights rewrite themselves, token by token, by the delta
rule."""

import numpy as np
import torch
from torch import Tensor

from kernels.delta.srwm.naive import srwm_naive
from kernels.delta.srwm.scan import srwm_scan
from kernels.delta.srwm.step_numba import srwm_step_numba
from kernels.library import define
from kernels.pool import array_of, as_float32, flat

__all__ = ["srwm", "srwm_naive", "srwm_scan", "srwm_step"]


def srwm(
    x: Tensor, weight: Tensor, pool: Tensor | None, slots: Tensor, depths: Tensor, offsets: Tensor
) -> Tensor:
    """Apply each sequence's own weights to its tokens and let them rewrite themselves: packed x [T, H, D]
    (after the input's softmax, where the model has one), weight [H, D, R] the learned start, float32 -> y [T,
    H, E].

    The R = E + 2 D + 4 columns make y [E], q [D], k [D] and beta [4]: the paper's matrix, transposed. The
    pool [slots, depths, H, D, R] holds how far a sequence has moved from the learned weights, so zeros are a
    fresh one. With a pool it is updated in place; without one all segments are fresh, and the result is
    differentiable (training).
    """
    if pool is None:
        zero = x.new_zeros(len(offsets) - 1, *weight.shape, dtype=torch.float32)
        return srwm_scan(x, weight, zero, offsets)[0].to(x.dtype)
    return srwm_step(x, weight, pool, slots, depths, offsets)


def _width(weight: Tensor) -> int:
    """E: what is left of the columns for the output."""
    return weight.shape[2] - 2 * weight.shape[1] - 4


def _on_cpu(
    x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, depths: Tensor, offsets: Tensor
) -> Tensor:
    out = np.empty((*x.shape[:2], _width(weight)), np.float32)
    at = (flat(pool), array_of(slots), array_of(depths), array_of(offsets))
    srwm_step_numba(as_float32(x), as_float32(weight), *at, out)
    return torch.from_numpy(out).to(x.dtype)


def _on_gpu(
    x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, depths: Tensor, offsets: Tensor
) -> Tensor:
    import triton

    from kernels.delta.srwm.step_triton import srwm_step_kernel

    H, D, _ = weight.shape
    E = _width(weight)
    out = x.new_empty(*x.shape[:2], E)
    srwm_step_kernel[(slots.shape[0] * H,)](
        x.contiguous(), weight.contiguous(), pool, slots, depths, offsets, out,
        pool.stride(0), pool.stride(1),
        H=H, D=D, E=E, BLOCK_D=triton.next_power_of_2(D), BLOCK_E=triton.next_power_of_2(E),
        num_warps=1 if D <= 16 else 4 if D <= 32 else 8,
    )  # fmt: skip
    return out


def _shape_only(
    x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, depths: Tensor, offsets: Tensor
) -> Tensor:
    return x.new_empty(*x.shape[:2], _width(weight))


srwm_step = define(
    "srwm_step(Tensor x, Tensor weight, Tensor(a!) pool, Tensor slots, Tensor depths, "
    "Tensor offsets) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
