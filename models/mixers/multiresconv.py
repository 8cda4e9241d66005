"""MultiresConv (arXiv 2305.01850): a learned wavelet decomposition of the past, as dilated causal
convolutions."""

from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from kernels.conv import conv_taps
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GatedOutput, GenericConfig, decoder
from models.layers import saved_as
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Config", "MultiresConv", "build"]


class Config(GenericConfig):
    kernel_size: int = pydantic.Field(2, ge=2, le=16)
    depth: int = pydantic.Field(
        10, ge=1, le=20
    )  # levels; the past seen is (kernel_size - 1) (2^depth - 1) tokens
    glu: bool = True


class MultiresConv(Mixer):
    """Level i convolves what the one before left with h0 (kept) and h1 (read), dilated by 2^i; w weighs what
    is read, what is left at the end (column 0), and the token itself (the last column)."""

    def __init__(self, c: Config):
        super().__init__()
        D = c.hidden_size
        self.channels, self.width, self.depth = D, c.kernel_size, c.depth
        self.h0 = nn.Parameter(torch.empty(D, 1, c.kernel_size))
        self.h1 = nn.Parameter(torch.empty(D, 1, c.kernel_size))
        self.w = nn.Parameter(torch.empty(D, c.depth + 2))
        self.output = saved_as("output_linear", GatedOutput(D, D, c.glu))

    def leaves(self) -> LayerLeaves:
        leaves = {}
        for i in range(self.depth):
            leaves[f"level{i}"] = Leaf(((self.width - 1) * 2**i, self.channels))
            leaves[f"cursor{i}"] = Leaf((1,))
        return leaves

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        filters = torch.stack([self.h0, self.h1]).squeeze(2).transpose(1, 2)  # [2, W, D]
        y, left = x * self.w[:, -1], x
        for i in range(self.depth):
            taps = conv_taps(
                left, pool_of(state, f"level{i}"), *batch.index,
                width=self.width, dilation=2**i, cursor_pool=pool_of(state, f"cursor{i}"),
            )  # fmt: skip
            left, read = (taps.unsqueeze(1) * filters).sum(2).unbind(1)
            y = torch.addcmul(y, read, self.w[:, self.depth - i])
        return self.output(torch.addcmul(y, left, self.w[:, 0]))

    def flops(self) -> int:
        return self.depth * self.channels * (4 * self.width + 2)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: MultiresConv(c))
