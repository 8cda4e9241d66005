"""The causal convolution over many tokens: packed, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import pad, unpad


def conv_scan(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, offsets: Tensor, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """Packed x [T, C], weight [C, W], state [N, (W - 1) * dilation, C], offsets [N + 1] -> y [T, C], the
    states at the ends."""
    xs = _after(state, x, offsets)
    y = F.conv1d(
        xs.transpose(1, 2),
        weight.float()[:, None],
        None if bias is None else bias.float(),
        dilation=dilation,
        groups=xs.shape[2],
    )
    return unpad(y.transpose(1, 2), offsets), _last(xs, state.shape[1], offsets)


def taps_scan(
    x: Tensor, state: Tensor, offsets: Tensor, width: int, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """As `conv_scan`, without the sum: packed x [T, C] -> what each token sees [T, W, C], oldest first."""
    xs = _after(state, x, offsets)
    length = xs.shape[1] - state.shape[1]
    seen = torch.stack([xs[:, w * dilation : w * dilation + length] for w in range(width)], 2)
    return unpad(seen, offsets), _last(xs, state.shape[1], offsets)


def _after(state: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """[N, R + L, C]: each segment's inputs behind those that it remembers."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.cat([state, pad(x.float(), offsets, longest)], 1)


def _last(xs: Tensor, size: int, offsets: Tensor) -> Tensor:
    """The last `size` inputs up to each segment's end [N, size, C]."""
    at = offsets.diff()[:, None] + torch.arange(size, device=xs.device)
    return xs.gather(1, at[:, :, None].expand(-1, -1, xs.shape[2]))
