"""The self-referential weight matrix (arXiv 2202.05780): a layer that rewrites its own weights."""

from collections.abc import Iterator
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from kernels.delta.srwm import srwm
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GenericConfig, decoder
from models.layers import Linear, Parted
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "SRWM", "Config", "build"]


class Config(GenericConfig):
    num_heads: int = pydantic.Field(4, gt=0)
    use_input_softmax: bool = True

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        self.heads_of("hidden_size", self.hidden_size, self.num_heads)
        return self


class StartingWeights(Parted):
    """The learned start of every sequence's matrix, [H, D, R]: what makes y, q, k and the four rates of
    change."""

    def __init__(self, heads: int, D: int):
        super().__init__()
        self.sizes = D, D, D, 4
        self.weight = nn.Parameter(torch.empty(heads, D, sum(self.sizes)))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(("W_y", "W_q", "W_k", "w_b"), self.weight.split(self.sizes, -1), strict=True)


class SRWM(Mixer):
    """[y, q, k, beta] = W x; W moves at k, by sigmoid(beta), from what it gives there to what it gives at
    q."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.width = c.num_heads, c.hidden_size // c.num_heads
        self.start = StartingWeights(self.heads, self.width)
        self.softmax = c.use_input_softmax
        self.out_linear = Linear(c.hidden_size, c.hidden_size, bias=False)

    def leaves(self) -> LayerLeaves:
        return {"dW": Leaf((self.heads, self.width, 3 * self.width + 4))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        h = x.unflatten(-1, (self.heads, self.width))
        h = h.softmax(-1) if self.softmax else h
        y = srwm(h, self.start.weight.float(), pool_of(state, "dW"), *batch.index)
        return self.out_linear(y.flatten(-2).to(x.dtype))

    def flops(self) -> int:
        return 8 * self.heads * self.width * (3 * self.width + 4)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: SRWM(c))
