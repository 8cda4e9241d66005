"""The outer-product recurrence over many tokens: chunked, packed, differentiable.

Within a chunk the contribution of token j to token i is a masked matrix product weighted by exp(G_i - G_j), G
the running sum of the log decay. That factor is at most 1, but exp(G_i) and exp(-G_j) apart overflow under
strong decay, so a chunk is cut into blocks: between two blocks both factors are taken relative to a point
that lies between i and j (both at most 1), and inside a block the difference is formed before the
exponential. All chunks are computed at once; across them only the state carries on. (Secondary chunking: GLA,
arXiv 2312.06635, section 4.3.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.packing import pad, unpad

CHUNK = 64
BLOCK = 16


def outer_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    offsets: Tensor,
    scale: float,
    bonus: Tensor | None = None,
    by_value: bool = False,
) -> tuple[Tensor, Tensor]:
    """Packed q [T, Hq, K], k [T, Hk, K], v [T, Hv, V], g None, [T, H], [T, Hg, K] or (by_value) [T, Hg, V];
    state [N, H, K, V] at the start of each of the N segments; offsets [N+1]. Returns o [T, max(H, Hq), V] and
    the states at the ends, float32."""
    H, K, V = state.shape[1:]
    heads = max(H, q.shape[1])
    lengths = offsets.diff()
    padded = int(lengths.max()) if len(lengths) else 0
    padded += -padded % BLOCK
    chunk = min(CHUNK, padded)
    padded += -padded % max(chunk, 1)
    if g is not None and g.dim() == 2:
        g = g.unsqueeze(-1)

    def lay(x: Tensor, to_heads: int) -> Tensor:  # [T, h, d] -> [N, heads, L, d]
        x = pad(x.float(), offsets, padded).transpose(1, 2)
        return x.repeat_interleave(to_heads // x.shape[1], dim=1)

    # Padding holds k = 0 and g = 0, which leaves the state as it is.
    qs, ks, vs = lay(q, heads) * scale, lay(k, H), lay(v, H)
    gs = None if g is None else lay(g, H).expand(-1, -1, -1, V if by_value else K)
    state = state.float()
    if not padded:
        return v.new_zeros(0, heads, v.shape[2], dtype=torch.float32), state
    qs, ks, vs = (x.unflatten(2, (-1, chunk)) for x in (qs, ks, vs))
    gs = torch.zeros_like(ks) if gs is None else gs.unflatten(2, (-1, chunk))
    reads = heads // H
    chunks = _by_value(qs, ks, vs, gs, reads) if by_value else _by_key(qs, ks, vs, gs, reads, bonus)
    starts = []
    for fade, write in zip(chunks.fade.unbind(2), chunks.write.unbind(2), strict=True):
        starts.append(state)
        state = fade * state + write
    read = chunks.query @ _group(torch.stack(starts, 2), reads)
    out = chunks.inside + (read if chunks.weight is None else read * chunks.weight)
    return unpad(out.flatten(2, 3).transpose(1, 2), offsets), state


class _Chunks(NamedTuple):
    """What each of n chunks does, whatever the state [N, H, K, V] is that it begins with."""

    inside: Tensor  # [N, heads, n, C, V]: what its outputs have of its own tokens
    query: Tensor  # [N, heads, n, C, K]: how they read that state,
    weight: Tensor | None  # [N, heads, n, C, V]: and what is made of that
    fade: Tensor  # [N, H, n, K or 1, 1 or V]: what is left of the state at its end,
    write: Tensor  # [N, H, n, K, V]: and what is added


def _group(x: Tensor, reads: int) -> Tensor:
    """[N, H, ...] -> [N, H * reads, ...]: a head for each query of it."""
    return x if reads == 1 else x.repeat_interleave(reads, dim=1)


def _by_key(q: Tensor, k: Tensor, v: Tensor, g: Tensor, reads: int, bonus: Tensor | None) -> _Chunks:
    """q [N, H * reads, n, C, K], k, g [N, H, n, C, K], v [N, H, n, C, V]."""
    C = k.shape[3]
    G = g.cumsum(3)
    # The bonus reads the state before this token's decay: the query looks from G_{i-1}, and not at itself.
    Gq = G if bonus is None else G - g
    last = G[:, :, :, -1:]
    write = (k * (last - G).exp()).transpose(-1, -2) @ v
    fade = last.exp().transpose(-1, -2)
    query = q * _group(Gq.exp(), reads)

    ks, vs, Gs, Gqs = (_group(x, reads) for x in (k, v, G, Gq))
    q_b, k_b, Gq_b, G_b = (x.unflatten(3, (-1, BLOCK)) for x in (q, ks, Gqs, Gs))
    own = _block(q_b, k_b, Gq_b, G_b, bonus is not None)  # [N, heads, n, C / BLOCK, BLOCK, BLOCK]
    rows = []
    for i in range(0, C, BLOCK):
        here = slice(i, i + BLOCK)
        scores = own[:, :, :, i // BLOCK]
        if i:
            origin = Gs[:, :, :, i - 1 : i]
            q_i = q[:, :, :, here] * (Gqs[:, :, :, here] - origin).exp()
            k_j = ks[:, :, :, :i] * (origin - Gs[:, :, :, :i]).exp()
            scores = torch.cat([q_i @ k_j.transpose(-1, -2), scores], -1)
        rows.append(scores @ vs[:, :, :, : i + BLOCK])
    inside = torch.cat(rows, 3)
    if bonus is not None:
        now = (q * _group(k * bonus[:, None, None].float(), reads)).sum(-1, keepdim=True)
        inside = inside + now * vs
    return _Chunks(inside, query, None, fade, write)


def _by_value(q: Tensor, k: Tensor, v: Tensor, g: Tensor, reads: int) -> _Chunks:
    """As `_by_key`, with the decay on the state's columns: g [N, H, n, C, V] weighs values, and not keys."""
    C = k.shape[3]
    G = g.cumsum(3)
    last = G[:, :, :, -1:]
    write = k.transpose(-1, -2) @ (v * (last - G).exp())
    vs, Gs = _group(v, reads), _group(G, reads)
    scores = q @ _group(k, reads).transpose(-1, -2)  # [N, heads, n, C, C]
    seen = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).tril()

    rows = []
    for i in range(0, C, BLOCK):
        here = slice(i, i + BLOCK)
        G_i = Gs[:, :, :, here]
        ratio = (G_i.unsqueeze(4) - G_i.unsqueeze(3)).masked_fill(~seen[..., None], float("-inf")).exp()
        row = torch.einsum("nhcij,nhcijv,nhcjv->nhciv", scores[:, :, :, here, here], ratio, vs[:, :, :, here])
        if i:
            origin = Gs[:, :, :, i - 1 : i]
            before = scores[:, :, :, here, :i] @ (vs[:, :, :, :i] * (origin - Gs[:, :, :, :i]).exp())
            row = row + before * (G_i - origin).exp()
        rows.append(row)
    return _Chunks(torch.cat(rows, 3), q, Gs.exp(), last.exp(), write)


def _block(q: Tensor, k: Tensor, Gq: Tensor, Gk: Tensor, strict: bool) -> Tensor:
    """Scores [.., B, B] of a block [.., B, K] with itself: sum_k q_i k_j exp(Gq_i - Gk_j), j <= i (j < i if
    strict)."""
    B = q.shape[-2]
    seen = torch.ones(B, B, dtype=torch.bool, device=q.device).tril(-1 if strict else 0)
    # Masking the exponent and not the result keeps the gradient of the hidden half finite.
    ratio = (Gq.unsqueeze(-2) - Gk.unsqueeze(-3)).masked_fill(~seen[..., None], float("-inf")).exp()
    return torch.einsum("...ik,...jk,...ijk->...ij", q, k, ratio)
