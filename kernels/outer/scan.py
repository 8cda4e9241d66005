"""The outer-product recurrence over many tokens: chunked, packed, differentiable.

Within a chunk the contribution of token j to token i is a masked matrix product weighted by exp(G_i - G_j), G
the running sum of the log decay. That factor is at most 1, but exp(G_i) and exp(-G_j) apart overflow under
strong decay, so a chunk is cut into blocks: between two blocks both factors are taken relative to a point
that lies between i and j (both at most 1), and inside a block the difference is formed before the
exponential. Across chunks the state carries on. (Secondary chunking: GLA, arXiv 2312.06635, section 4.3.)
"""

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
    reads = heads // H
    outs = []
    state = state.float()
    for start in range(0, padded, max(chunk, 1)):
        at = slice(start, start + chunk)
        parts = qs[:, :, at], ks[:, :, at], vs[:, :, at]
        if by_value and gs is not None:
            out, state = _chunk_by_value(*parts, gs[:, :, at], state, reads)
        else:
            out, state = _chunk(*parts, None if gs is None else gs[:, :, at], state, reads, bonus)
        outs.append(out)
    if not outs:
        return v.new_zeros(0, heads, v.shape[2], dtype=torch.float32), state
    return unpad(torch.cat(outs, 2).transpose(1, 2), offsets), state


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reads: int, bonus: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One chunk: q [N, H * reads, C, K], k, g [N, H, C, K], v [N, H, C, V], state [N, H, K, V]."""
    C = k.shape[2]
    group = (lambda x: x) if reads == 1 else (lambda x: x.repeat_interleave(reads, dim=1))
    if g is None:
        g = torch.zeros_like(k)
    G = g.cumsum(2)
    # The bonus reads the state before this token's decay: the query looks from G_{i-1}, and not at itself.
    Gq = G if bonus is None else G - g
    out = (q * group(Gq.exp())) @ group(state)

    rows = []
    for i in range(0, C, BLOCK):
        here = slice(i, i + BLOCK)
        inside = _block(
            q[:, :, here],
            group(k[:, :, here]),
            group(Gq[:, :, here]),
            group(G[:, :, here]),
            bonus is not None,
        )
        parts = [inside]
        if i:
            origin = G[:, :, i - 1 : i]
            q_i = q[:, :, here] * group((Gq[:, :, here] - origin).exp())
            k_j = k[:, :, :i] * (origin - G[:, :, :i]).exp()
            parts.insert(0, q_i @ group(k_j).transpose(-1, -2))
        scores = torch.cat(parts, -1)
        rows.append(scores @ group(v[:, :, : i + BLOCK]))
    out = out + torch.cat(rows, 2)
    if bonus is not None:
        now = (q * group(k * bonus[:, None].float())).sum(-1, keepdim=True)
        out = out + now * group(v)
    last = G[:, :, -1:]
    state = last.exp().transpose(-1, -2) * state + (k * (last - G).exp()).transpose(-1, -2) @ v
    return out, state


def _chunk_by_value(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, reads: int
) -> tuple[Tensor, Tensor]:
    """As `_chunk`, with the decay on the state's columns: g [N, H, C, V] weighs values, and not keys."""
    C = k.shape[2]
    group = (lambda x: x) if reads == 1 else (lambda x: x.repeat_interleave(reads, dim=1))
    G = g.cumsum(2)
    out = (q @ group(state)) * group(G.exp())
    scores = q @ group(k).transpose(-1, -2)  # [N, H * reads, C, C]
    seen = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).tril()

    rows = []
    for i in range(0, C, BLOCK):
        here = slice(i, i + BLOCK)
        G_i = G[:, :, here]
        ratio = (G_i.unsqueeze(3) - G_i.unsqueeze(2)).masked_fill(~seen[..., None], float("-inf")).exp()
        row = torch.einsum(
            "nhij,nhijv,nhjv->nhiv", scores[:, :, here, here], group(ratio), group(v[:, :, here])
        )
        if i:
            origin = G[:, :, i - 1 : i]
            before = scores[:, :, here, :i] @ group(v[:, :, :i] * (origin - G[:, :, :i]).exp())
            row = row + before * group((G_i - origin).exp())
        rows.append(row)
    last = G[:, :, -1:]
    state = last.exp() * state + k.transpose(-1, -2) @ (v * (last - G).exp())
    return out + torch.cat(rows, 2), state


def _block(q: Tensor, k: Tensor, Gq: Tensor, Gk: Tensor, strict: bool) -> Tensor:
    """Scores [.., B, B] of one block with itself: sum_k q_i k_j exp(Gq_i - Gk_j), j <= i (j < i if
    strict)."""
    B = q.shape[2]
    seen = torch.ones(B, B, dtype=torch.bool, device=q.device).tril(-1 if strict else 0)
    # Masking the exponent and not the result keeps the gradient of the hidden half finite.
    ratio = (Gq.unsqueeze(3) - Gk.unsqueeze(2)).masked_fill(~seen[..., None], float("-inf")).exp()
    return torch.einsum("nhik,nhjk,nhijk->nhij", q, k, ratio)
