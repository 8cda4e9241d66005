"""Aaren (arXiv 2405.13956): attention with a learned constant query, which makes it a recurrence."""

from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from kernels.diagonal.logsumexp import aaren
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GenericConfig, decoder
from models.layers import Linear, Packed
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Aaren", "Config", "build"]


class Config(GenericConfig):
    num_heads: int = pydantic.Field(4, gt=0)

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        self.heads_of("hidden_size", self.hidden_size, self.num_heads)
        return self


class Aaren(Mixer):
    """The average of all values so far, weighted by exp(q . k / sqrt(K))."""

    def __init__(self, c: Config):
        super().__init__()
        D = c.hidden_size
        self.heads, self.V = c.num_heads, D // c.num_heads
        self.query = nn.Parameter(torch.empty(self.heads, self.V))
        self.in_proj = Packed(D, {"k_proj": D, "v_proj": D})
        self.out_proj = Linear(D, D, bias=False)

    def leaves(self) -> LayerLeaves:
        return {"average": Leaf((self.heads * (self.V + 2),))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        k, v = (y.unflatten(-1, (self.heads, self.V)) for y in self.in_proj(x))
        scores = (k.float() * self.query.float()).sum(-1) * self.V**-0.5
        o = aaren(scores, v, pool_of(state, "average"), *batch.index)
        return self.out_proj(o.flatten(-2).to(x.dtype))

    def flops(self) -> int:
        return self.heads * (6 * self.V + 4)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: Aaren(c))
