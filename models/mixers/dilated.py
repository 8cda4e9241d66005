"""A causal depthwise convolution with dilation, its past in a ring."""

import torch
from torch import Tensor, nn

from kernels.conv import conv
from models.batch import Batch
from models.state import LayerLeaves, LayerState, Leaf, pool_of


class DilatedConv(nn.Module):
    """Weight [channels, 1, width], as torch.nn.Conv1d has it; the last tap meets the token itself."""

    def __init__(self, channels: int, width: int, dilation: int, silu: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.dilation, self.silu = dilation, silu

    def leaves(self, name: str) -> LayerLeaves:
        channels, _, width = self.weight.shape
        ring = {name: Leaf(((width - 1) * self.dilation, channels))}
        return ring if self.dilation == 1 else {**ring, f"{name}_cursor": Leaf((1,))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None, name: str) -> Tensor:
        """x [T, channels] -> [T, channels]."""
        cursor = None if self.dilation == 1 else pool_of(state, f"{name}_cursor")
        return conv(
            x, self.weight.squeeze(1), None, pool_of(state, name), *batch.index,
            silu=self.silu, dilation=self.dilation, cursor_pool=cursor,
        )  # fmt: skip

    def flops(self) -> int:
        return 2 * self.weight.numel()
