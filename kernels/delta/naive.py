"""A matrix state that decays, forgets along one direction and takes in an outer product, one token at a time.

    delta: S* = diag(exp(g_t)) S_{t-1};  S_t = S* + beta_t k_t (v_t - S*^T k_t)^T          S: [K, V]
    dplr:  S_t = diag(exp(w_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T
    o_t = scale * S_t^T q_t

Sources: DeltaNet arXiv 2406.06484; with negative eigenvalues, beta in (0, 2), 2411.12537; Gated DeltaNet
2412.06464; KDA 2510.26692; RWKV-7 2503.14456, where a = -kappa and b = kappa * (in-context learning rate).
"""

import torch
from torch import Tensor


def delta_naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One sequence, one head at a time.

    q [T, Hq, K], k [T, Hk, K], v [T, H, V], beta [T, H]; log decay g: None, [T, H] (one per head) or [T, Hg,
    K] (one per key channel); state [H, K, V]. Heads that a tensor lacks are shared by groups of neighbours.
    Returns o [T, H, V] and the final state.
    """
    H, states = state.shape[0], list(state)
    out = torch.zeros_like(v)
    for t in range(v.shape[0]):
        for h in range(H):
            k_t, q_t = k[t, h * k.shape[1] // H], q[t, h * q.shape[1] // H]
            S = states[h]
            if g is not None:
                S = g[t, h * g.shape[1] // H].exp().expand_as(k_t)[:, None] * S
            states[h] = S + beta[t, h] * torch.outer(k_t, v[t, h] - S.T @ k_t)
            out[t, h] = scale * (states[h].T @ q_t)
    return out, torch.stack(states)


def dplr_naive(
    q: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One sequence, one head at a time: q, log decay w, k, a, b [T, H, K], v [T, H, V], state [H, K, V] ->
    o [T, H, V], the final state."""
    states = list(state)
    out = torch.zeros_like(v)
    for t in range(v.shape[0]):
        for h, S in enumerate(states):
            erased = torch.outer(b[t, h], S.T @ a[t, h])
            states[h] = w[t, h].exp()[:, None] * S + erased + torch.outer(k[t, h], v[t, h])
            out[t, h] = scale * (states[h].T @ q[t, h])
    return out, torch.stack(states)
