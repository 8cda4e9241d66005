"""Decayed outer-product state, one token at a time.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          S: [K, V]
    o_t = scale * S_t^T q_t                           (linear attention, RetNet, GLA, Mamba-2)
    o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t (RWKV-6: the bonus u, read before the decay)

With ``by_value`` the decay belongs to the columns, S_t = S_{t-1} diag(exp(g_t)) + k_t v_t^T: the first pass
of gated slot attention (arXiv 2409.07146 eq. 4).

Sources: GLA arXiv 2312.06635 eq. 3; RetNet arXiv 2307.08621 eq. 6; Mamba-2 arXiv 2405.21060 eq. 1; RWKV-6
arXiv 2404.05892 eq. 18.
"""

import torch
from torch import Tensor


def outer_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    bonus: Tensor | None = None,
    by_value: bool = False,
) -> tuple[Tensor, Tensor]:
    """One sequence, one head at a time.

    q [T, Hq, K], k [T, Hk, K], v [T, Hv, V]; log decay g: None, [T, H] (one per head), [T, Hg, K] (one per
    key channel) or, by value, [T, Hg, V]; state [H, K, V] with H = max(Hk, Hv, Hg); bonus u [H, K]. Heads
    that a tensor lacks are shared by groups of neighbours, as in grouped-query attention. Returns o [T,
    max(H, Hq), V] and the final state.
    """
    length, H = q.shape[0], state.shape[0]
    heads = max(H, q.shape[1])
    state = state.clone()
    out = torch.zeros(length, heads, v.shape[2], dtype=state.dtype, device=state.device)
    for t in range(length):
        written = torch.empty_like(state)
        for h in range(H):
            k_t = k[t, h * k.shape[1] // H]
            v_t = v[t, h * v.shape[1] // H]
            write = torch.outer(k_t, v_t)
            along = v_t if by_value else k_t
            decay = torch.ones_like(along) if g is None else g[t, h * g.shape[1] // H].exp().expand_as(along)
            after = state[h] * (decay[None, :] if by_value else decay[:, None]) + write
            written[h] = after if bonus is None else state[h] + bonus[h][:, None] * write
            state[h] = after
        for h in range(heads):
            q_t = q[t, h * q.shape[1] // heads]
            out[t, h] = scale * (written[h * H // heads].T @ q_t)
    return out, state
