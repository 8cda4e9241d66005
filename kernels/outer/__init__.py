"""A matrix state that decays and takes in outer products: linear attention, RetNet, GLA, Mamba-2, RWKV-6."""

import numpy as np
import torch
from torch import Tensor

from kernels.library import define
from kernels.outer.naive import outer_naive
from kernels.outer.scan import outer_scan
from kernels.outer.step_numba import outer_step_numba
from kernels.outer.train_numba import outer_train
from kernels.pool import array_of, as_float32, flat
from kernels.tiles import tile

__all__ = ["outer", "outer_naive", "outer_scan", "outer_step", "outer_train"]

_NONE_3D = np.zeros((0, 1, 1), np.float32)
_NONE_2D = np.zeros((0, 0), np.float32)


def outer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    bonus: Tensor | None = None,
    by_value: bool = False,
) -> Tensor:
    """Advance each segment's state over its tokens and read it: packed q [T, Hq, K], k [T, Hk, K], v [T, Hv,
    V], log decay g (None, [T, H], [T, Hg, K], or [T, Hg, V] where it is by_value), bonus [H, K] -> o [T, Ho,
    V].

    With a pool [slots, depths, H, K, V] the states are read and written in place; without one they start from
    zero and are dropped, and the result is differentiable (training).
    """
    if by_value and (bonus is not None or g is None or g.dim() != 3):
        raise ValueError("by_value: needs a log decay g [T, Hg, V], and takes no bonus")
    if pool is None and not q.is_cuda and bonus is None and not by_value:
        return outer_train(q, k, v, g, offsets, scale).to(q.dtype)
    if pool is None:
        H = max(k.shape[1], v.shape[1], g.shape[1] if g is not None else 1)
        zero = q.new_zeros(len(offsets) - 1, H, k.shape[2], v.shape[2], dtype=torch.float32)
        return outer_scan(q, k, v, g, zero, offsets, scale, bonus, by_value)[0].to(q.dtype)
    if q.is_cuda and q.shape[0] >= 16 * slots.shape[0]:  # long segments: matrix products beat the recurrence
        out, state = outer_scan(q, k, v, g, pool[slots, depths], offsets, scale, bonus, by_value)
        pool[slots, depths] = state
        return out.to(q.dtype)
    return outer_step(q, k, v, g, bonus, pool, slots, depths, offsets, scale, by_value)


def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
    by_value: bool = False,
) -> Tensor:
    H = pool.shape[2]
    out = np.empty((q.shape[0], max(H, q.shape[1]), v.shape[2]), np.float32)
    decay = _NONE_3D
    if g is not None:
        decay = as_float32(g.float().exp())
        decay = decay if decay.ndim == 3 else decay[:, :, None]
    outer_step_numba(
        as_float32(q),
        as_float32(k),
        as_float32(v),
        decay,
        _NONE_2D if bonus is None else as_float32(bonus),
        flat(pool),
        array_of(slots),
        array_of(depths),
        array_of(offsets),
        out,
        H,
        np.float32(scale),
        by_value,
    )
    return torch.from_numpy(out).to(q.dtype)


def _on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
    by_value: bool = False,
) -> Tensor:
    import triton

    from kernels.outer.step_triton import outer_step_kernel

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    g = q if g is None else g.contiguous()
    decay = 0 if g is q else 3 if by_value else g.dim() - 1
    _, _, H, K, V = pool.shape
    HO = max(H, q.shape[1])
    out = q.new_empty(q.shape[0], HO, V)
    size = tile("outer", K, V, slots.shape[0] * H, pool.device)
    outer_step_kernel[(triton.cdiv(V, size.block_v) * slots.shape[0] * H,)](
        q, k, v, g, q if bonus is None else bonus.contiguous(), pool, slots, depths, offsets, out,
        scale, pool.stride(0), pool.stride(1),
        H=H, HQ=q.shape[1], HK=k.shape[1], HV=v.shape[1], HG=g.shape[1], HO=HO, K=K, V=V,
        BLOCK_K=triton.next_power_of_2(K), BLOCK_V=size.block_v, DECAY=decay, BONUS=bonus is not None,
        num_warps=size.warps,
    )  # fmt: skip
    return out


def _shape_only(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
    by_value: bool = False,
) -> Tensor:
    return q.new_empty(q.shape[0], max(pool.shape[2], q.shape[1]), v.shape[2])


outer_step = define(
    "outer_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? bonus, Tensor(a!) pool, Tensor slots, "
    "Tensor depths, Tensor offsets, float scale, bool by_value=False) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
