"""RWKV's token shift: what the token before had, less what this one has."""

import torch
from torch import Tensor, nn

from kernels.conv import conv
from models.batch import Batch
from models.state import Leaf


class TokenShift(nn.Module):
    """x_{t-1} - x_t: a convolution of two taps. Before the first token stands zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self._taps: Tensor | None = None  # [channels, 2]

    def leaf(self) -> Leaf:
        return Leaf((1, self.channels))

    def forward(self, x: Tensor, batch: Batch, pool: Tensor | None) -> Tensor:
        """x [T, channels] -> [T, channels]."""
        if self._taps is None or self._taps.device != x.device:
            self._taps = torch.tensor([1.0, -1.0], device=x.device).repeat(self.channels, 1)
        return conv(x, self._taps, None, pool, *batch.index, silu=False)
