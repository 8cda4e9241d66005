"""RWKV's token shift: what the token before had, less what this one has."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kernels.conv import conv
from models.batch import Batch
from models.layers import Parted
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


class Shares(Parted):
    """How much of the token before goes into each projection's input: a vector [1, 1, C] for each name."""

    def __init__(self, names: Sequence[str], channels: int):
        super().__init__()
        self.names = names
        self.weight = nn.Parameter(torch.empty(len(names), 1, channels))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for i, name in enumerate(self.names):
            yield name, self.weight[i : i + 1]

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """x, delta [T, C] -> an input [T, C] for each name."""
        return torch.addcmul(x, delta, self.weight).unbind(0)

    def before(self, x: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """The same where a share counts the token itself, and the rest is the token before."""
        return torch.lerp(x + delta, x, self.weight).unbind(0)
