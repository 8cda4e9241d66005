"""The delta rule and its general form over many tokens: chunked, packed, differentiable.

Within a chunk every token's correction depends on those before it. With G_i the running sum of the log decay,
and S the state at the chunk's beginning, the values u_i that the delta rule really writes solve a triangular
system,

    u_i + beta_i sum_{j<i} (k_i . exp(G_i - G_j) k_j) u_j = beta_i (v_i - S^T (exp(G_i) k_i)),

after which state and output are those of plain decayed outer products k_i u_i^T (the WY representation:
DeltaNet arXiv 2406.06484, Gated DeltaNet 2412.06464, KDA 2510.26692). The general form reads
p_i = S_{i-1}^T a_i,

    p_i - sum_{j<i} (a_i . exp(G_{i-1} - G_j) b_j) p_j
        = S^T (exp(G_{i-1}) a_i) + sum_{j<i} (a_i . exp(G_{i-1} - G_j) k_j) v_j,

and writes b_i p_i^T and k_i v_i^T. The systems are solved by substitution, which unlike the explicit inverse
stays accurate when the keys of a chunk are nearly parallel.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import pad, unpad

CHUNK = 64  # a power of two


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Packed q [T, Hq, K], k [T, Hk, K], v [T, H, V], beta [T, H], g None, [T, H] or [T, Hg, K]; state [N, H,
    K, V] at the start of each of the N segments; offsets [N + 1]. Returns o [T, H, V] and the states at the
    ends, float32."""
    # Padding holds beta = 0 and g = 0, which leaves the state as it is.
    if g is None:
        g = torch.zeros_like(beta)
    if g.dim() == 2:
        g = g[..., None]
    parts, lay = _layout(offsets, state.shape[1])
    qs, ks, vs, betas, gs = (lay(x) for x in (q * scale, k, v, beta[..., None], g))
    outs, state = [vs[:, :, :0]], state.float()
    for at in parts:
        out, state = _delta_chunk(state, *(x[:, :, at] for x in (qs, ks, vs, betas, gs)))
        outs.append(out)
    return unpad(torch.cat(outs, 2).transpose(1, 2), offsets), state


def dplr_scan(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Packed q, log decay w, k, a, b [T, H, K], v [T, H, V]; state [N, H, K, V]; offsets [N + 1]. Returns
    o [T, H, V] and the states at the ends, float32."""
    parts, lay = _layout(offsets, state.shape[1])
    laid = [lay(x) for x in (q * scale, w, k, v, a, b)]
    outs, state = [laid[3][:, :, :0]], state.float()
    for at in parts:
        out, state = _dplr_chunk(state, *(x[:, :, at] for x in laid))
        outs.append(out)
    return unpad(torch.cat(outs, 2).transpose(1, 2), offsets), state


def _layout(offsets: Tensor, H: int) -> tuple[list[slice], Callable[[Tensor], Tensor]]:
    """The chunks, and a function that lays packed tokens [T, h, d] out as [N, H, L, d], L a multiple of the
    chunk."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    chunk = min(CHUNK, 1 << max(0, longest - 1).bit_length())
    padded = longest + -longest % chunk

    def lay(x: Tensor) -> Tensor:
        x = pad(x.float(), offsets, padded).transpose(1, 2)
        return x if x.shape[1] == H else x.repeat_interleave(H // x.shape[1], dim=1)

    return [slice(start, start + chunk) for start in range(0, padded, chunk)], lay


def _delta_chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: q (scaled), k [N, H, C, K], v [N, H, C, V], beta [N, H, C, 1], g [N, H, C, K or 1], state
    [N, H, K, V]."""
    G = g.cumsum(2)
    seen, system = _scores(torch.stack([q, k]), G, k, G)
    seen = seen + torch.diag_embed((q * k).sum(-1))
    grown = G.exp()
    given = beta * (v - (k * grown) @ state)
    u = torch.linalg.solve_triangular(beta * system, given, upper=False, unitriangular=True)
    out = (q * grown) @ state + seen @ u
    last = G[:, :, -1:]
    return out, last.exp().transpose(-1, -2) * state + (k * (last - G).exp()).transpose(-1, -2) @ u


def _dplr_chunk(
    state: Tensor, q: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: q (scaled), w, k, a, b [N, H, C, K], v [N, H, C, V], state [N, H, K, V]."""
    G = w.cumsum(2)
    before = G - w  # a token reads the state that its decay has not touched
    scores = _scores(torch.stack([q, a])[:, None], torch.stack([G, before])[:, None], torch.stack([k, b]), G)
    (seen_k, seen_b), (read_k, read_b) = scores
    seen_k = seen_k + torch.diag_embed((q * k).sum(-1))
    seen_b = seen_b + torch.diag_embed((q * b).sum(-1))
    given = (a * before.exp()) @ state + read_k @ v
    p = torch.linalg.solve_triangular(-read_b, given, upper=False, unitriangular=True)
    out = (q * G.exp()) @ state + seen_k @ v + seen_b @ p
    last = G[:, :, -1:]
    left = (last - G).exp()
    state = last.exp().transpose(-1, -2) * state
    return out, state + (k * left).transpose(-1, -2) @ v + (b * left).transpose(-1, -2) @ p


def _scores(x: Tensor, Gx: Tensor, y: Tensor, Gy: Tensor) -> Tensor:
    """sum_k x_i y_j exp(Gx_i - Gy_j) for j < i, 0 elsewhere: x, y [.., C, K], log decays [.., C, K or 1] ->
    [.., C, C].

    The factor is at most 1, but exp(Gx_i) and exp(-Gy_j) apart overflow under strong decay. With one decay
    for all channels the difference is formed first. With one for each, the triangle is put together from
    squares, twice as large at each level: between the earlier and the later half of a block both factors are
    taken relative to the end of the earlier one, where both are at most 1.
    """
    C = x.shape[-2]
    if Gx.shape[-1] == 1:
        hidden = torch.ones(C, C, dtype=torch.bool, device=x.device).triu()
        # Masking the exponent and not the result keeps the gradient of the hidden half finite.
        ratio = (Gx - Gy.transpose(-1, -2)).masked_fill(hidden, float("-inf")).exp()
        return (x @ y.transpose(-1, -2)) * ratio
    triangles = (x[..., :1] * y[..., :1] * 0).unsqueeze(-1)  # [.., C, 1, 1]
    size = 1
    while size < C:
        later, Gl = (i.unflatten(-2, (-1, 2, size))[..., 1, :, :] for i in (x, Gx))
        earlier, Ge = (i.unflatten(-2, (-1, 2, size))[..., 0, :, :] for i in (y, Gy))
        origin = Ge[..., -1:, :]
        square = (later * (Gl - origin).exp()) @ (earlier * (origin - Ge).exp()).transpose(-1, -2)
        top = F.pad(triangles[..., 0::2, :, :], (0, size))
        triangles = torch.cat([top, torch.cat([square, triangles[..., 1::2, :, :]], -1)], -2)
        size *= 2
    return triangles.squeeze(-3)
