"""The selective scan of Mamba: a state [N, C] whose decay and input depend on the token."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.bound import Bound
from kernels.diagonal.selective.mixer_numba import (
    MixerWeights,
    mixer_step_numba,
    softplus_numba,
    unweighted_rms_norm_numba,
)
from kernels.diagonal.selective.naive import selective_naive
from kernels.diagonal.selective.scan import selective_scan
from kernels.diagonal.selective.step_numba import Ints, selective_step_numba
from kernels.diagonal.selective.train_numba import selective_train
from kernels.library import define
from kernels.norm import rms_norm_numba
from kernels.pool import Floats, array_of, as_float32, flat
from kernels.tiles import tile

__all__ = [
    "MixerWeights",
    "Step",
    "mixer_half",
    "mixer_step",
    "selective",
    "selective_naive",
    "selective_scan",
    "selective_step",
    "selective_train",
    "softplus",
    "unweighted_rms_norm",
]


def selective(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Advance each segment's state over its tokens and read it: packed x, dt, z [T, C], B, C [T, N] -> y [T,
    C].

    A [N, C] is the (negative) transition, transposed against the papers' [C, N], float32; D [C] the skip, z
    the gate of y silu(z). dt is the step size after bias and softplus: one call of torch on [T, C], against N
    exponentials here.

    With a pool [slots, depths, N, C] the states are read and written in place; without one they start from
    zero and are dropped, and the result is differentiable (training).
    """
    if pool is None and not x.is_cuda:
        return selective_train(x, dt, A, B, C, D, z, offsets).to(x.dtype)
    if pool is None:
        zero = x.new_zeros(len(offsets) - 1, *A.shape, dtype=torch.float32)
        return selective_scan(x, dt, A, B, C, D, z, zero, offsets)[0].to(x.dtype)
    return selective_step(x, dt, A, B, C, D, z, pool, slots, depths, offsets)


Step = Callable[[Floats, Tensor, Tensor, Ints, Ints], Floats]
"""x [T, D], contiguous, the pools of `kernels.conv.conv` and of `selective`, slots and depths: one token for each of T
slots, on a CPU -> [T, D]."""


def mixer_step(weights: MixerWeights, rms_eps: float | None) -> Step:
    """A decoding step of Mamba's whole mixer; with `rms_eps`, step size, B and C are normed without weights (Falcon
    Mamba)."""
    run, rms = Bound(mixer_step_numba), np.float32(-1 if rms_eps is None else rms_eps)

    def step(x: Floats, conv_pool: Tensor, pool: Tensor, slots: Ints, depths: Ints) -> Floats:
        out = np.empty_like(x)
        run(x, weights, rms, flat(conv_pool), flat(pool), slots, depths, out)
        return out

    return step


def mixer_half(step: Step, norm: Floats, eps: np.float32) -> Step:
    """x + step(norm(x)), norm [D]. In calls of its parts, whose bits it has to have: not every batch takes this way."""

    def half(x: Floats, conv_pool: Tensor, pool: Tensor, slots: Ints, depths: Ints) -> Floats:
        normed = np.empty_like(x)
        rms_norm_numba(x, norm, eps, normed)
        out = step(normed, conv_pool, pool, slots, depths)
        out += x
        return out

    return half


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) of float32 on a CPU, with the arithmetic of `mixer_step`."""
    made = np.array(as_float32(x))
    softplus_numba(made)
    return torch.from_numpy(made)


def unweighted_rms_norm(x: Tensor, eps: float) -> Tensor:
    """x [T, C] / sqrt(mean x^2 + eps), float32 on a CPU, with the arithmetic of `mixer_step`."""
    made = np.array(as_float32(x))
    unweighted_rms_norm_numba(made, np.float32(eps))
    return torch.from_numpy(made)


def _on_cpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    out = np.empty(x.shape, np.float32)
    selective_step_numba(
        as_float32(x),
        as_float32(dt),
        as_float32(A),
        as_float32(B),
        as_float32(C),
        np.zeros(x.shape[1], np.float32) if D is None else as_float32(D),
        np.zeros((0, x.shape[1]), np.float32) if z is None else as_float32(z),
        flat(pool),
        array_of(slots),
        array_of(depths),
        array_of(offsets),
        out,
    )
    return torch.from_numpy(out).to(x.dtype)


def _on_gpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    import triton

    from kernels.diagonal.selective.step_triton import selective_step_kernel

    x = x.contiguous()
    N, channels = A.shape
    out = torch.empty_like(x)
    size = tile("diagonal", N, channels, slots.shape[0], pool.device)
    selective_step_kernel[(triton.cdiv(channels, size.block_v), slots.shape[0])](
        x, dt.contiguous(), A.contiguous(), B.contiguous(), C.contiguous(), x if D is None else D,
        x if z is None else z.contiguous(), pool, slots, depths, offsets, out, pool.stride(0), pool.stride(1),
        C=channels, N=N, BLOCK_C=size.block_v, BLOCK_N=triton.next_power_of_2(N),
        SKIP=D is not None, GATE=z is not None, num_warps=size.warps,
    )  # fmt: skip
    return out


def _shape_only(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    return torch.empty_like(x)


selective_step = define(
    "selective_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor(a!) pool, Tensor slots, Tensor depths, Tensor offsets) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
