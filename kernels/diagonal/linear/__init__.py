"""Linear recurrences whose decay is given: real and from the token (RG-LRU, HGRN), complex and static (LRU,
S4D)."""

import numpy as np
import torch
from torch import Tensor

from kernels.diagonal.linear.naive import gated_naive, lru_naive, s4d_naive
from kernels.diagonal.linear.scan import gated_scan, lru_scan, s4d_scan
from kernels.diagonal.linear.step_numba import gated_step_numba, lru_step_numba, s4d_step_numba
from kernels.library import define
from kernels.pool import array_of, as_float32, flat
from kernels.tiles import tile

__all__ = [
    "gated", "gated_naive", "gated_scan", "linear_step", "lru", "lru_naive", "lru_scan",
    "s4d", "s4d_naive", "s4d_scan",
]  # fmt: skip


def gated(
    g: Tensor, b: Tensor, pool: Tensor | None, slots: Tensor, depths: Tensor, offsets: Tensor
) -> Tensor:
    """h_t = exp(g_t) h_{t-1} + b_t: packed log decay g and input b [T, C] -> the states h [T, C].

    With a pool [slots, depths, C] each segment goes on from its state and leaves the new one there; without
    one it begins with zeros, and the result is differentiable. The same holds for the two functions below.
    """
    if pool is None:
        zero = b.new_zeros(len(offsets) - 1, b.shape[1], dtype=torch.float32)
        return gated_scan(g, b, zero, offsets)[0].to(b.dtype)
    return linear_step(b, g, None, None, pool, slots, depths, offsets)


def lru(
    b: Tensor, lam: Tensor, pool: Tensor | None, slots: Tensor, depths: Tensor, offsets: Tensor
) -> Tensor:
    """x_t = lambda x_{t-1} + b_t, complex: packed b [T, 2, C], lambda [2, C] float32 -> the states x [T, 2,
    C]; pool [slots, depths, 2, C]. Index 0 is the real part, 1 the imaginary one: b is one real matrix
    product, and so is Re(C x)."""
    if pool is None:
        zero = b.new_zeros(len(offsets) - 1, *lam.shape, dtype=torch.float32)
        return lru_scan(b, lam, zero, offsets)[0].to(b.dtype)
    return linear_step(b, lam, None, None, pool, slots, depths, offsets)


def s4d(
    u: Tensor,
    lam: Tensor,
    c: Tensor,
    D: Tensor | None,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    """x_t = lambda x_{t-1} + u_t, y_t = 2 Re(sum_n c_n x_{t,n}) + D u_t: packed u [T, C], lambda and c [2, N,
    C] float32 (real, imaginary), D [C] -> y [T, C]; pool [slots, depths, 2, N, C]. N counts the kept halves
    of conjugate pairs.

    With zero-order hold lambda = exp(dt A), and c = C B (exp(dt A) - 1) / A.
    """
    if pool is None:
        zero = u.new_zeros(len(offsets) - 1, *lam.shape, dtype=torch.float32)
        return s4d_scan(u, lam, c, D, zero, offsets)[0].to(u.dtype)
    return linear_step(u, lam, c, D, pool, slots, depths, offsets)


def _on_cpu(
    u: Tensor,
    decay: Tensor,
    read: Tensor | None,
    skip: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    out = np.empty(u.shape, np.float32)
    at = (flat(pool), array_of(slots), array_of(depths), array_of(offsets), out)
    if read is not None:
        D = np.zeros(u.shape[1], np.float32) if skip is None else as_float32(skip)
        s4d_step_numba(as_float32(u), as_float32(decay), as_float32(read), D, *at)
    elif pool.dim() == 4:
        lru_step_numba(as_float32(u), as_float32(decay), *at)
    else:
        gated_step_numba(as_float32(u), as_float32(decay), *at)
    return torch.from_numpy(out).to(u.dtype)


def _on_gpu(
    u: Tensor,
    decay: Tensor,
    read: Tensor | None,
    skip: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    import triton

    from kernels.diagonal.linear.step_triton import linear_step_kernel

    u = u.contiguous()
    N, C = pool.shape[-2] if read is not None else 1, pool.shape[-1]
    out = torch.empty_like(u)
    is_complex = pool.dim() > 3
    size = tile("diagonal", 4 * N if is_complex else N, C, slots.shape[0], pool.device)
    linear_step_kernel[(triton.cdiv(C, size.block_v), slots.shape[0])](
        u, decay.contiguous(), u if read is None else read.contiguous(), u if skip is None else skip,
        pool, slots, depths, offsets, out, pool.stride(0), pool.stride(1),
        C=C, N=N, BLOCK_C=size.block_v, BLOCK_N=triton.next_power_of_2(N),
        COMPLEX=is_complex, READ=read is not None, SKIP=skip is not None, num_warps=size.warps,
    )  # fmt: skip
    return out


def _shape_only(
    u: Tensor,
    decay: Tensor,
    read: Tensor | None,
    skip: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    return torch.empty_like(u)


linear_step = define(
    "linear_step(Tensor u, Tensor decay, Tensor? read, Tensor? skip, Tensor(a!) pool, Tensor slots, "
    "Tensor depths, Tensor offsets) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
