"""Softmax averages over the past, one token at a time: a numerator a, a denominator c and their scale m, so
that the sums of the exponentials are a e^m and c e^m and nothing overflows.

    aaren: m' = max(m, s);  a' = a e^{m - m'} + v e^{s - m'};  c' = c e^{m - m'} + e^{s - m'};  o = a' / c'
           (Aaren, arXiv 2405.13956: attention with a learned constant query, s = q . k)
    wkv:   o = (a e^m + v e^{u + k}) / (c e^m + e^{u + k}), then the same update with s = k and m + w for m
           (RWKV-4, arXiv 2305.13048; w <= 0 the log decay, u the bonus)

The state before the first token is all zeros: c = 0 says that there is no past, and m is not looked at.
"""

import torch
from torch import Tensor


def aaren_naive(s: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: scores s [T, H], v [T, H, V], state [H * (V + 2)] (a [H, V], then c [H], then m [H]) -> o
    [T, H, V], the final state."""
    H, V = v.shape[1:]
    a, c, m = _parts(state, H, V)
    out = torch.empty_like(v)
    for t in range(v.shape[0]):
        a, c, m = _add(a, c, m, s[t], v[t])
        out[t] = a / c[:, None]
    return out, torch.cat([a.flatten(), c, m])


def wkv_naive(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: k, v [T, C], log decay w [C], bonus u [C], state [3, C] (a, c, m) -> o [T, C], the final
    state."""
    a, c, m = _parts(state.flatten(), k.shape[1], 1)
    out = torch.empty_like(v)
    for t in range(v.shape[0]):
        seen_a, seen_c, _ = _add(a, c, m, u + k[t], v[t][:, None])
        out[t] = seen_a[:, 0] / seen_c
        a, c, m = _add(a, c, m + w, k[t], v[t][:, None])
    return out, torch.stack([a[:, 0], c, m])


def _parts(state: Tensor, H: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    a, c, m = state.split([H * V, H, H])
    return a.view(H, V), c, m


def _add(a: Tensor, c: Tensor, m: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more element of score s [H] and value v [H, V]."""
    m = torch.where(c == 0, float("-inf"), m)
    top = torch.maximum(m, s)
    old, new = (m - top).exp(), (s - top).exp()
    return a * old[:, None] + v * new[:, None], c * old + new, top
