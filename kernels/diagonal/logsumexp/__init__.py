"""Softmax averages over the past in constant memory: Aaren's attention as a recurrence, and the WKV of
RWKV-4."""

import numpy as np
import torch
from torch import Tensor

from kernels.diagonal.logsumexp.naive import aaren_naive, wkv_naive
from kernels.diagonal.logsumexp.scan import aaren_scan, wkv_scan
from kernels.diagonal.logsumexp.step_numba import aaren_step_numba, wkv_step_numba
from kernels.library import define
from kernels.pool import array_of, as_float32, flat
from kernels.tiles import tile

__all__ = ["aaren", "aaren_naive", "aaren_scan", "logsumexp_step", "wkv", "wkv_naive", "wkv_scan"]


def aaren(
    s: Tensor, v: Tensor, pool: Tensor | None, slots: Tensor, depths: Tensor, offsets: Tensor
) -> Tensor:
    """The average of each head's values so far, weighted by e^s: packed scores s [T, H], v [T, H, V] -> o [T,
    H, V].

    With a pool [slots, depths, H * (V + 2)] (numerators [H, V], denominators [H], scales [H]) each segment
    goes on from its state and leaves the new one there; without one it begins with no past, and the result is
    differentiable. All zeros are a state without a past.
    """
    if pool is None:
        zero = v.new_zeros(len(offsets) - 1, v.shape[1] * (v.shape[2] + 2), dtype=torch.float32)
        return aaren_scan(s, v, zero, offsets)[0].to(v.dtype)
    return logsumexp_step(s, v, None, None, pool, slots, depths, offsets)


def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    """RWKV-4's average over the past, weighted by e^{k + w age}, with the token itself at e^{k + u}: packed
    k, v [T, C], w [C] the log decay (-exp(time_decay)), u [C] the bonus (time_first) -> [T, C]; pool [slots,
    depths, 3, C] (numerator, denominator, scale), as for `aaren`."""
    if pool is None:
        zero = v.new_zeros(len(offsets) - 1, 3, v.shape[1], dtype=torch.float32)
        return wkv_scan(k, v, w, u, zero, offsets)[0].to(v.dtype)
    return logsumexp_step(k, v, w, u, pool, slots, depths, offsets)


def _on_cpu(
    s: Tensor,
    v: Tensor,
    w: Tensor | None,
    u: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    out = np.empty(v.shape, np.float32)
    at = (flat(pool), array_of(slots), array_of(depths), array_of(offsets), out)
    if w is None or u is None:
        aaren_step_numba(as_float32(s), as_float32(v), *at)
    else:
        wkv_step_numba(as_float32(s), as_float32(v), as_float32(w), as_float32(u), *at)
    return torch.from_numpy(out).to(v.dtype)


def _on_gpu(
    s: Tensor,
    v: Tensor,
    w: Tensor | None,
    u: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    import triton

    from kernels.diagonal.logsumexp.step_triton import logsumexp_step_kernel

    s, v = s.contiguous(), v.contiguous()
    H, V = s.shape[1], v.shape[2] if v.dim() == 3 else 1
    out = torch.empty_like(v)
    size = tile("diagonal", V, H, slots.shape[0], pool.device)
    logsumexp_step_kernel[(triton.cdiv(H, size.block_v), slots.shape[0])](
        s, v, s if w is None else w, s if u is None else u, pool, slots, depths, offsets, out,
        pool.stride(0), pool.stride(1),
        H=H, V=V, BLOCK_H=size.block_v, BLOCK_V=triton.next_power_of_2(V), BONUS=w is not None,
        num_warps=size.warps,
    )  # fmt: skip
    return out


def _shape_only(
    s: Tensor,
    v: Tensor,
    w: Tensor | None,
    u: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    return torch.empty_like(v)


logsumexp_step = define(
    "logsumexp_step(Tensor s, Tensor v, Tensor? w, Tensor? u, Tensor(a!) pool, Tensor slots, Tensor depths, "
    "Tensor offsets) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
