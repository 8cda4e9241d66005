"""Linear recurrences with a given decay over many tokens: packed, differentiable.

S4D's decay is static and its state much larger than its output, so its scan never forms the states: within a
chunk y = K * u by the Fourier transform, K_l = 2 Re(sum_n c_n lambda_n^l), and the state only passes from
chunk to chunk.
"""

import torch
from torch import Tensor

from kernels.diagonal.recurrence import ends, recurrence
from kernels.packing import pad, unpad

CHUNK = 128


def gated_scan(g: Tensor, b: Tensor, state: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed log decay g and input b [T, C]; state [S, C] at the start of each segment; offsets [S + 1].
    Returns h [T, C] and the states at the ends, float32."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    h = recurrence(pad(g.float(), offsets, longest).exp(), pad(b.float(), offsets, longest), state.float())
    return unpad(h, offsets), ends(h, state.float(), lengths)


def lru_scan(b: Tensor, lam: Tensor, state: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed b [T, 2, C], lambda [2, C]; state [S, 2, C]. Returns x [T, 2, C] and the states at the ends,
    float32."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    inputs = _complex(pad(b.float(), offsets, longest), 2)
    begin = _complex(state.float(), 1)
    x = recurrence(_complex(lam.float(), 0).expand_as(inputs), inputs, begin)
    return unpad(torch.stack([x.real, x.imag], 2), offsets), _planes(ends(x, begin, lengths), 1)


def s4d_scan(
    u: Tensor, lam: Tensor, c: Tensor, D: Tensor | None, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed u [T, C], lambda, c [2, N, C], D [C]; state [S, 2, N, C]. Returns y [T, C] and the states at the
    ends, float32."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    inputs = pad(u.float(), offsets, longest)
    chunk = max(1, min(CHUNK, longest))
    powers = _powers(_complex(lam.float(), 0), chunk)  # [chunk + 1, N, C]
    weight = _complex(c.float(), 0)
    read = 2 * torch.einsum("lnc,nc->lc", powers[:-1], weight).real
    spectrum = torch.fft.rfft(read, 2 * chunk, dim=0)
    x = _complex(state.float(), 1)  # [S, N, C]
    outs = [inputs[:, :0]]
    for start in range(0, longest, chunk):
        here = inputs[:, start : start + chunk]
        size = here.shape[1]
        inside = torch.fft.irfft(torch.fft.rfft(here, 2 * chunk, dim=1) * spectrum, 2 * chunk, dim=1)[
            :, :size
        ]
        before = 2 * torch.einsum("lnc,snc->slc", powers[1 : size + 1] * weight, x).real
        outs.append(inside + before)
        taken = (lengths - start).clamp(0, size)
        x = powers[taken] * x + _last(here, powers, taken)
    y = unpad(torch.cat(outs, 1), offsets)
    return (y if D is None else y + D.float() * u.float()), _planes(x, 1)


def _last(u: Tensor, powers: Tensor, taken: Tensor) -> Tensor:
    """What u [S, L, C] adds to the states: sum_j lambda^(taken - 1 - j) u_j over the first `taken` [S]
    tokens."""
    back = taken[:, None] - 1 - torch.arange(u.shape[1], device=u.device)  # [S, L]
    # Reversed in time, so that all segments share the powers; what lies behind a segment's end is zero
    # already.
    order = back.clamp_min(0)
    reverse = u.gather(1, order[..., None].expand_as(u)) * (back >= 0)[..., None]
    return torch.einsum("lnc,slc->snc", powers[: u.shape[1]], reverse.to(powers.dtype))


def _powers(lam: Tensor, count: int) -> Tensor:
    """lambda^0 .. lambda^count, [count + 1, N, C]: multiplied up in double precision, so that they keep their
    digits."""
    repeated = lam.to(torch.complex128).expand(count, *lam.shape)
    return torch.cat([torch.ones_like(repeated[:1]), repeated.cumprod(0)]).to(lam.dtype)


def _complex(x: Tensor, dim: int) -> Tensor:
    return torch.complex(x.select(dim, 0), x.select(dim, 1))


def _planes(x: Tensor, dim: int) -> Tensor:
    return torch.stack([x.real, x.imag], dim)
