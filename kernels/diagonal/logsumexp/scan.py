"""Softmax averages over many tokens: packed, differentiable.

The scale m is a running maximum, found in log2(length) steps; with it, numerator and denominator are linear
recurrences whose factors are at most 1. The result does not depend on which scale is taken, so no gradient
goes through it, but for that of the state at the beginning.
"""

import torch
from torch import Tensor

from kernels.diagonal.recurrence import ends, recurrence
from kernels.packing import pad, unpad

_NOTHING = -1e30  # the scale of an empty past: e^-1e30 = 0, and differences of it stay finite


def aaren_scan(s: Tensor, v: Tensor, state: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed scores s [T, H], v [T, H, V]; state [S, H * (V + 2)] at the start of each segment; offsets [S +
    1]. Returns o [T, H, V] and the states at the ends, float32."""
    H, V = v.shape[1:]
    scores, values, lengths = _padded(s, v, offsets)
    begin = _parts(state, H, V)
    a, c, m = _scan(scores, values, scores.new_zeros(H), begin)
    finish = [ends(x, x0, lengths) for x, x0 in zip((a, c, m), begin, strict=True)]
    return unpad(a / c[..., None], offsets), torch.cat([finish[0].flatten(1), *finish[1:]], 1)


def wkv_scan(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed k, v [T, C]; log decay w and bonus u [C]; state [S, 3, C]. Returns o [T, C] and the states at
    the ends, float32."""
    C = k.shape[1]
    keys, values, lengths = _padded(k, v[..., None], offsets)
    begin = _parts(state.flatten(1), C, 1)
    a, c, m = _scan(keys, values, w.float(), begin)
    # The output sees the past as it was before this token, and the token itself with its bonus.
    known = (*begin[:2], _scale(begin))
    past_a, past_c, past_m = (
        torch.cat([x0[:, None], x[:, :-1]], 1) for x, x0 in zip((a, c, m), known, strict=True)
    )
    now = u.float() + keys
    top = torch.maximum(past_m, now).detach()
    old, new = (past_m - top).exp(), (now - top).exp()
    out = (past_a[..., 0] * old + values[..., 0] * new) / (past_c * old + new)
    finish = [ends(x, x0, lengths) for x, x0 in zip((a, c, m), begin, strict=True)]
    return unpad(out, offsets), torch.stack([finish[0][..., 0], *finish[1:]], 1)


def _padded(s: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return pad(s.float(), offsets, longest), pad(v.float(), offsets, longest), lengths


def _parts(state: Tensor, H: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """a [S, H, V], c, m [S, H] of [S, H * (V + 2)]."""
    a, c, m = state.float().split([H * V, H, H], dim=1)
    return a.unflatten(1, (H, V)), c, m


def _scale(begin: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """m, or that of an empty past."""
    return torch.where(begin[1] == 0, _NOTHING, begin[2])


def _scan(
    s: Tensor, v: Tensor, w: Tensor, begin: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores s [S, L, H], v [S, L, H, V], log decay w [H] -> a [S, L, H, V], c, m [S, L, H] after each
    token."""
    if s.shape[1] == 0:
        return v, s, s
    a0, c0, _ = begin
    m0 = _scale(begin)
    with torch.no_grad():
        # m_t = max over j of s_j + (t - j) w, over 1, 2, 4 .. tokens. Any scale near it would do, if all use
        # it.
        m = torch.cat([torch.maximum(m0 + w, s[:, 0])[:, None], s[:, 1:]], 1)
        span = 1
        while span < m.shape[1]:
            m = torch.cat([m[:, :span], torch.maximum(m[:, span:], m[:, :-span] + span * w)], 1)
            span *= 2
    before = torch.cat([m0[:, None], m[:, :-1]], 1)
    keep, write = (before + w - m).exp(), (s - m).exp()
    a = recurrence(keep[..., None].expand_as(v), write[..., None] * v, a0)
    return a, recurrence(keep, write, c0), m
