"""The short convolution over many tokens: packed, differentiable."""

import torch.nn.functional as F
from torch import Tensor, cat

from kernels.packing import pad, unpad


def conv_scan(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed x [T, C], weight [C, W], state [N, W - 1, C], offsets [N + 1] -> y [T, C], the states at the
    ends."""
    width = weight.shape[1]
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    xs = cat([state, pad(x.float(), offsets, longest)], 1)  # [N, W - 1 + L, C]
    y = F.conv1d(
        xs.transpose(1, 2),
        weight.float()[:, None],
        None if bias is None else bias.float(),
        groups=xs.shape[2],
    )
    last = xs.unfold(1, width - 1, 1) if width > 1 else xs[:, :, :, None][:, :, :, :0]  # [N, L + 1, C, W - 1]
    ends = lengths.view(-1, 1, 1, 1).expand(-1, 1, *last.shape[2:])
    return unpad(y.transpose(1, 2), offsets), last.gather(1, ends).squeeze(1).transpose(1, 2)
