"""Attention over many tokens at once, in torch: for training, and for long segments of a prefill, where
matrix products beat the kernels that walk token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import pad, unpad

QUERIES = 256  # tokens of one block: with a window, a block looks at no more than window + QUERIES entries

Past = list[tuple[Tensor, Tensor]]


def attention_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Past | None,
    offsets: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Past | None]:
    """Packed q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], offsets [N + 1]; `past` holds each segment's
    entries so far, keys [C, Hkv, D] and values [C, Hkv, Dv], or is None where all begin empty. Returns o [T,
    Hq, Dv] and the entries at the ends (None for None). Differentiable."""
    if past is None:
        return _from_empty(q, k, v, offsets, scale, softcap, window), None
    bounds = offsets.tolist()
    outs, ends = [], []
    for n, (keys, values) in enumerate(past):
        a, b = bounds[n], bounds[n + 1]
        last = torch.arange(keys.shape[0], keys.shape[0] + b - a, device=q.device)
        keys, values = torch.cat([keys, k[a:b]]), torch.cat([values, v[a:b]])
        outs.append(attend(q[a:b], keys, values, last, scale, softcap, window))
        ends.append((keys, values))
    return torch.cat(outs), ends


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    last: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """One sequence: each of q [T, Hq, D] sees entry `last` [T] (rising) of keys [E, Hkv, D] and values [E,
    Hkv, Dv], and those before it, at most `window` in all -> [T, Hq, Dv]."""
    ks, vs = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)  # [1, Hkv, E, ...]
    blocks = []
    for start in range(0, q.shape[0], QUERIES):
        at = last[start : start + QUERIES]
        low, high = 0, keys.shape[0]
        if not q.is_cuda:  # elsewhere the bounds are worth less than the wait for them
            low = 0 if window is None else max(0, int(at[0]) - window + 1)
            high = int(at[-1]) + 1
        seen = _seen(torch.arange(low, high, device=q.device), at[:, None], window)
        qs = q[start : start + QUERIES].transpose(0, 1).unsqueeze(0)  # [1, Hq, T, D]
        blocks.append(_softmax_attention(qs, ks[:, :, low:high], vs[:, :, low:high], seen, scale, softcap)[0])
    if not blocks:
        return q.new_zeros(0, q.shape[1], values.shape[2])
    return torch.cat(blocks, 1).transpose(0, 1)


def _from_empty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """All segments side by side: what lies behind a segment's end is never seen by what lies before."""
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    if longest == 0:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    qs, ks, vs = (pad(x, offsets, longest).transpose(1, 2) for x in (q, k, v))  # [N, H, L, D]
    at = torch.arange(longest, device=q.device)
    narrow = window is not None and window < longest
    seen = _seen(at, at[:, None], window) if narrow or softcap is not None else None
    return unpad(_softmax_attention(qs, ks, vs, seen, scale, softcap).transpose(1, 2), offsets)


def _seen(entries: Tensor, last: Tensor, window: int | None) -> Tensor:
    seen = entries <= last
    return seen if window is None else seen & (entries > last - window)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """q [N, Hq, T, D], k [N, Hkv, E, D], v [N, Hkv, E, Dv], seen [T, E] (None without softcap: causal, T = E)
    -> [N, Hq, T, Dv]."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    assert seen is not None
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = softcap * torch.tanh((q * scale) @ k.transpose(-1, -2) / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
