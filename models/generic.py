"""Fathom's own format, for families that have no published one: blocks of norm, mixer and an optional gated
MLP.

docs/formats.md lists every key and tensor.
"""

from collections.abc import Callable
from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig, one_of
from models.decoder import Block, Decoder, Mixer
from models.errors import ConfigError
from models.layers import ACTIVATIONS, GatedMLP, Linear, RMSNorm


class GenericConfig(ModelConfig):
    """Keys of all of these families. A key that is none of a family's is refused."""

    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = pydantic.Field(1e-6, gt=0)
    intermediate_size: int | None = pydantic.Field(None, gt=0)  # None: no MLP
    hidden_act: str = "silu"

    @pydantic.field_validator("hidden_act")
    @classmethod
    def _known(cls, name: str) -> str:
        return one_of(name, ACTIVATIONS)

    @classmethod
    def problems(cls, raw: dict[str, Any], file: object) -> list[ConfigError]:
        unknown = [ConfigError(file, key, raw[key], "is no key of this format") for key in cls.unknown(raw)]
        return [*unknown, *super().problems(raw, file)]

    def heads_of(self, name: str, width: int, heads: int) -> int:
        """A width cut into heads. Raises ValueError where it cannot be."""
        if width % heads:
            raise ValueError(f"{name} = {width} must be a multiple of num_heads = {heads}")
        return width // heads


def decoder(c: GenericConfig, mixer: Callable[[], Mixer]) -> Decoder:
    D = c.hidden_size

    def norm() -> nn.Module:
        return RMSNorm(D, c.norm_eps) if c.norm == "rmsnorm" else nn.LayerNorm(D, c.norm_eps)

    def block() -> Block:
        if c.intermediate_size is None:
            return Block(norm(), mixer())
        return Block(norm(), mixer(), norm(), GatedMLP(D, c.intermediate_size, c.hidden_act))

    blocks = [block() for _ in range(c.num_hidden_layers)]
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    return Decoder(nn.Embedding(c.vocab_size, D), blocks, norm(), head)


class GatedOutput(nn.Module):
    """What state-space layers end with: GELU, then a projection, gated by half of itself."""

    def __init__(self, inputs: int, outputs: int, gated: bool):
        super().__init__()
        self.linear = Linear(inputs, 2 * outputs if gated else outputs)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(F.gelu(x))
        return F.glu(y) if self.gated else y


NAMES = ((r"\.mixer_norm\.", ".norm."),)
