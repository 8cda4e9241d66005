"""The short causal convolution that many families put before their recurrence."""

import torch
from torch import Tensor, nn

from kernels.conv import conv
from models.batch import Batch
from models.state import Leaf


class ShortConv(nn.Module):
    """Depthwise over `channels`, `width` taps, then SiLU. The checkpoint's weight is [channels, 1, width]."""

    def __init__(self, channels: int, width: int, bias: bool = False, silu: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.silu = silu

    def leaf(self) -> Leaf:
        return Leaf((self.weight.shape[2] - 1, self.weight.shape[0]))

    def forward(self, x: Tensor, batch: Batch, pool: Tensor | None) -> Tensor:
        """x [T, channels] -> [T, channels]."""
        return conv(
            x, self.weight.squeeze(1), self.bias, pool, batch.slots, batch.depths, batch.offsets, silu=self.silu
        )
