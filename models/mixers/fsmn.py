"""Feedforward sequential memory (FSMN, arXiv 1512.08301; compact, 1803.05030), looking back only."""

from typing import Any

import pydantic
from torch import Tensor

from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GenericConfig, decoder
from models.layers import Linear
from models.mixers.dilated import DilatedConv
from models.state import LayerLeaves, LayerState

__all__ = ["FSMN", "NAMES", "Config", "build"]


class Config(GenericConfig):
    memory_size: int | None = pydantic.Field(None, gt=0)  # default hidden_size
    order: int = pydantic.Field(8, ge=2, le=256)  # tokens that a memory sees, its own among them
    stride: int = pydantic.Field(1, ge=1, le=4096)  # tokens between two that it sees


class FSMN(Mixer):
    """p = linear(x); out_proj(p + conv(p)): every memory channel adds a weighted sum of its past."""

    def __init__(self, c: Config):
        super().__init__()
        width = c.memory_size or c.hidden_size
        self.linear = Linear(c.hidden_size, width, bias=False)
        self.conv = DilatedConv(width, c.order, c.stride)
        self.out_proj = Linear(width, c.hidden_size, bias=False)

    def leaves(self) -> LayerLeaves:
        return self.conv.leaves("memory")

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        p = self.linear(x)
        return self.out_proj(p + self.conv(p, batch, state, "memory"))

    def flops(self) -> int:
        return self.conv.flops()


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: FSMN(c))
