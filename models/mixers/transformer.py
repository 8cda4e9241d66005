"""Transformers with rotary positions, in flash-linear-attention's checkpoint format: what its other families are
compared with."""

from typing import Any, ClassVar

import pydantic

from models.decoder import Decoder
from models.fla import NAMES, AttentionSpec, FLAConfig, decoder

__all__ = ["NAMES", "Config", "build"]


class Config(FLAConfig):
    inert: ClassVar[frozenset[str]] = frozenset({"elementwise_affine"})  # its norms always have weights

    num_heads: int = pydantic.Field(32, gt=0)
    num_kv_heads: int | None = pydantic.Field(None, gt=0)
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = pydantic.Field(None, gt=0)
    rope_theta: float = pydantic.Field(10000.0, gt=0)
    attn: None = None

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        keys = AttentionSpec.model_fields.keys() & type(self).model_fields.keys()
        return (AttentionSpec(layers=(), **{key: getattr(self, key) for key in keys}),)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda i: c.attention[0].mixer(c.hidden_size, c.qk_norm))
