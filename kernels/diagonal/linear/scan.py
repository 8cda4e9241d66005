"""Linear recurrences with a given decay over many tokens: packed, differentiable.

S4D's decay is static and its state much larger than its output, so its scan never forms the states: within a
chunk y = K * u by the Fourier transform, K_l = 2 Re(sum_n c_n lambda_n^l), and the state only passes from
chunk to chunk.
"""

import torch
from torch import Tensor

from kernels.diagonal.recurrence import ends, recurrence
from kernels.packing import pad, unpad

CHUNK = 64


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
    inputs = pad(u.float(), offsets, longest).transpose(1, 2)  # [S, C, L]
    chunk = max(1, min(CHUNK, longest))
    powers = _powers(_complex(lam.float(), 0), chunk)
    weighted = 2 * powers * _complex(c.float(), 0)
    # Products of complex matrices by real ones: Re(a b) = [Re a, -Im a] . [Re b, Im b].
    grow = _channels_first(powers.real, powers.imag)  # [C, chunk + 1, 2 N]
    read = _channels_first(weighted.real, -weighted.imag)
    spectrum = torch.fft.rfft(weighted.real.sum(1)[:-1].t(), 2 * chunk)
    x = _complex(state.float(), 1)  # [S, N, C]
    outs = [inputs[:, :, :0]]
    for start in range(0, longest, chunk):
        here = inputs[:, :, start : start + chunk]
        size = here.shape[2]
        inside = torch.fft.irfft(torch.fft.rfft(here, 2 * chunk) * spectrum, 2 * chunk)[:, :, :size]
        before = read[:, 1 : size + 1] @ _channels_first(x.real, x.imag).transpose(1, 2)  # [C, size, S]
        outs.append(inside + before.permute(2, 0, 1))
        taken = (lengths - start).clamp(0, size)
        added = _latest_first(here, taken).transpose(0, 1).contiguous() @ grow[:, :size]  # [C, S, 2 N]
        x = powers[taken] * x + torch.complex(*added.chunk(2, -1)).permute(1, 2, 0)
    y = unpad(torch.cat(outs, 2).transpose(1, 2), offsets)
    return (y if D is None else y + D.float() * u.float()), _planes(x, 1)


def _latest_first(u: Tensor, taken: Tensor) -> Tensor:
    """u [S, C, L] with the first `taken` [S] tokens of each segment in reverse, zeros behind: so all segments
    share the powers of lambda by which a token has decayed at their ends."""
    back = taken[:, None] - 1 - torch.arange(u.shape[2], device=u.device)  # [S, L]
    order = back.clamp_min(0)[:, None].expand_as(u)
    return u.gather(2, order) * (back >= 0)[:, None]


def _channels_first(re: Tensor, im: Tensor) -> Tensor:
    """[L, N, C] twice -> [C, L, 2 N]."""
    return torch.cat([re, im], 1).permute(2, 0, 1).contiguous()


def _powers(lam: Tensor, count: int) -> Tensor:
    """lambda^0 .. lambda^count, [count + 1, N, C], of lambda [N, C]: each step doubles how many there are."""
    powers = torch.ones_like(lam)[None]
    while powers.shape[0] <= count:
        powers = torch.cat([powers, powers * (powers[-1] * lam)])
    return powers[: count + 1]


def _complex(x: Tensor, dim: int) -> Tensor:
    return torch.complex(x.select(dim, 0), x.select(dim, 1))


def _planes(x: Tensor, dim: int) -> Tensor:
    return torch.stack([x.real, x.imag], dim)
