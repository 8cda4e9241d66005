"""Gated slot attention (arXiv 2409.07146): a softmax between two decayed outer-product states.

    Hk_t = Hk_{t-1} diag(exp(g_t)) + k_t s_t^T       [K, M]: the M slots are columns
    p_t = softmax(scale * Hk_t^T q_t)                [M]
    Hv_t = diag(exp(g_t)) Hv_{t-1} + s_t v_t^T       [M, V]: the M slots are rows
    o_t = Hv_t^T p_t                                 [V]

Usually s = 1 - exp(g).
"""

import torch
from torch import Tensor

from kernels.outer import outer, outer_scan

__all__ = ["gsa", "gsa_naive", "gsa_scan"]

State = tuple[Tensor, Tensor]


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    hk_pool: Tensor | None,
    hv_pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Packed q [T, Hq, K], k [T, H, K], v [T, H, V], what is written to the slots s [T, H, M], log decay of
    the slots g [T, H, M] -> o [T, Hq, V]; Hq is a multiple of H.

    Pools: hk [slots, depths, H, K, M], hv [slots, depths, H, M, V], advanced in place; without them the
    states start from zero and are dropped, and the result is differentiable (training).
    """
    index = slots, depths, offsets
    p = outer(q, k, s, g, hk_pool, *index, scale=scale, by_value=True).float().softmax(-1)
    return outer(p, s, v, g, hv_pool, *index, scale=1.0).to(v.dtype)


def gsa_naive(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: State, scale: float
) -> tuple[Tensor, State]:
    """One sequence, one token and head at a time; shapes as in `gsa`, with Hk [H, K, M], Hv [H, M, V]."""
    Hk, Hv = (x.clone() for x in state)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.empty(q.shape[0], heads, v.shape[2], dtype=v.dtype)
    for t in range(q.shape[0]):
        for h in range(k.shape[1]):
            Hk[h] = Hk[h] * g[t, h].exp()[None, :] + torch.outer(k[t, h], s[t, h])
            Hv[h] = Hv[h] * g[t, h].exp()[:, None] + torch.outer(s[t, h], v[t, h])
        for h in range(heads):
            p = (scale * Hk[h // group].T @ q[t, h]).softmax(0)
            out[t, h] = Hv[h // group].T @ p
    return out, (Hk, Hv)


def gsa_scan(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: State, offsets: Tensor, scale: float
) -> tuple[Tensor, State]:
    """As `gsa_naive` over packed tokens, differentiable: Hk [N, H, K, M], Hv [N, H, M, V] at the segments'
    starts."""
    scores, Hk = outer_scan(q, k, s, g, state[0], offsets, scale, by_value=True)
    o, Hv = outer_scan(scores.softmax(-1), s, v, g, state[1], offsets, 1.0)
    return o, (Hk, Hv)
