"""A matrix state that forgets along one direction before it takes in an outer product: DeltaNet, Gated
DeltaNet, KDA, RWKV-7. The self-referential weight matrix, which modifies itself by the same rule, is in
``kernels.delta.srwm``."""

import numpy as np
import torch
from torch import Tensor

from kernels.delta.naive import delta_naive, dplr_naive
from kernels.delta.scan import delta_scan, dplr_scan
from kernels.delta.step_numba import delta_step_numba
from kernels.delta.train_numba import delta_train, dplr_train
from kernels.library import define
from kernels.pool import array_of, as_float32, flat
from kernels.tiles import tile

__all__ = [
    "delta", "delta_naive", "delta_scan", "delta_step", "delta_train",
    "dplr", "dplr_naive", "dplr_scan", "dplr_train",
]  # fmt: skip

_NONE_3D = np.zeros((0, 1, 1), np.float32)
_NONE_2D = np.zeros((0, 1), np.float32)


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    scale: float,
) -> Tensor:
    """The delta rule S = S* + beta k (v - S*^T k)^T, S* = diag(exp(g)) S, o = scale S^T q, over each
    segment's tokens: packed q [T, Hq, K], k [T, Hk, K], v [T, H, V], beta [T, H], log decay g None
    (DeltaNet), [T, H] (Gated DeltaNet) or [T, Hg, K] (KDA) -> o [T, H, V]. Hq, Hk and Hg divide H.

    Keys of norm 1 and beta in (0, 1), or in (0, 2) for negative eigenvalues, keep the state bounded; that is
    the caller's.

    With a pool [slots, depths, H, K, V] the states are read and written in place; without one they start from
    zero and are dropped, and the result is differentiable (training).
    """
    if pool is None and not q.is_cuda and g is not None and g.dim() == 3:
        return delta_train(q, k, v, beta, g, offsets, scale).to(q.dtype)
    if pool is None:
        zero = q.new_zeros(len(offsets) - 1, v.shape[1], k.shape[2], v.shape[2], dtype=torch.float32)
        return delta_scan(q, k, v, beta, g, zero, offsets, scale)[0].to(q.dtype)
    if q.is_cuda and q.shape[0] >= 16 * slots.shape[0]:  # long segments: matrix products beat the recurrence
        out, state = delta_scan(q, k, v, beta, g, pool[slots, depths], offsets, scale)
        pool[slots, depths] = state
        return out.to(q.dtype)
    return delta_step(q, k, v, beta, g, None, None, pool, slots, depths, offsets, scale)


def dplr(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """A transition that is diagonal plus low-rank, S = (diag(exp(w)) + b a^T) S + k v^T, o = scale S^T q:
    packed q, log decay w, k, a, b [T, H, K], v [T, H, V] -> o [T, H, V]. RWKV-7 with a = -kappa, b = kappa *
    rate, q = r.

    The pool as for `delta`.
    """
    if pool is None and not q.is_cuda:
        return dplr_train(q, w, k, v, a, b, offsets, scale).to(q.dtype)
    if pool is None:
        zero = q.new_zeros(len(offsets) - 1, *k.shape[1:], v.shape[2], dtype=torch.float32)
        return dplr_scan(q, w, k, v, a, b, zero, offsets, scale)[0].to(q.dtype)
    if q.is_cuda and q.shape[0] >= 16 * slots.shape[0]:
        out, state = dplr_scan(q, w, k, v, a, b, pool[slots, depths], offsets, scale)
        pool[slots, depths] = state
        return out.to(q.dtype)
    return delta_step(q, k, v, None, w, a, b, pool, slots, depths, offsets, scale)


def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
) -> Tensor:
    out = np.empty(v.shape, np.float32)
    decay = _NONE_3D
    if g is not None:
        decay = as_float32(g.float().exp())
        decay = decay if decay.ndim == 3 else decay[:, :, None]
    delta_step_numba(
        as_float32(q),
        as_float32(k),
        as_float32(v),
        _NONE_2D if beta is None else as_float32(beta),
        decay,
        _NONE_3D if a is None else as_float32(a),
        _NONE_3D if b is None else as_float32(b),
        flat(pool),
        array_of(slots),
        array_of(depths),
        array_of(offsets),
        out,
        np.float32(scale),
    )
    return torch.from_numpy(out).to(q.dtype)


def _on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
) -> Tensor:
    import triton

    from kernels.delta.step_triton import delta_step_kernel

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    beta, a, b = (q if x is None else x.contiguous() for x in (beta, a, b))
    decay = 0 if g is None else g.dim() - 1
    g = q if g is None else g.contiguous()
    _, _, H, K, V = pool.shape
    out = torch.empty_like(v)
    size = tile("delta", K, V, slots.shape[0] * H, pool.device)
    delta_step_kernel[(triton.cdiv(V, size.block_v) * slots.shape[0] * H,)](
        q, k, v, beta, g, a, b, pool, slots, depths, offsets, out, scale, pool.stride(0), pool.stride(1),
        H=H, HQ=q.shape[1], HK=k.shape[1], HG=g.shape[1], K=K, V=V,
        BLOCK_K=triton.next_power_of_2(K), BLOCK_V=size.block_v, DECAY=decay, DPLR=a is not q,
        num_warps=size.warps,
    )  # fmt: skip
    return out


def _shape_only(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty_like(v)


delta_step = define(
    "delta_step(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? a, Tensor? b, "
    "Tensor(a!) pool, Tensor slots, Tensor depths, Tensor offsets, float scale) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
