"""Causal softmax attention over a growing list of entries, one token and one head at a time.

    s_e = scale * q_t . k_e,   optionally s_e = softcap * tanh(s_e / softcap)
    o_t = sum_e softmax(s)_e v_e     over the entries e that token t sees

The token's own entry comes last; of those before it sees all, or with a window W the last W - 1. Keys are
used as given: rotary embeddings and norms are the caller's. Sources: attention arXiv 1706.03762 eq. 1;
grouped queries arXiv 2305.13245; sliding window arXiv 2310.06825; softcap arXiv 2408.00118 section 2.
"""

import torch
from torch import Tensor


def attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence: q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], and the entries before them past_k [C, Hkv,
    D], past_v [C, Hkv, Dv]. Hq is a multiple of Hkv: neighbouring query heads share a key head. Returns o [T,
    Hq, Dv] and all keys and values [C + T, ...]."""
    keys, values = past_k, past_v
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    for t in range(q.shape[0]):
        keys, values = torch.cat([keys, k[t : t + 1]]), torch.cat([values, v[t : t + 1]])
        first = 0 if window is None else max(0, keys.shape[0] - window)
        for h in range(q.shape[1]):
            scores = scale * keys[first:, h // group] @ q[t, h]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, h] = scores.softmax(0) @ values[first:, h // group]
    return out, keys, values
