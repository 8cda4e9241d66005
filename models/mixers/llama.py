"""Llama-shaped transformers (arXiv 2302.13971), in transformers' checkpoint format: the base of recursive,
Mixture-of-Recursions and nested models. With lists of `exits` and `widths`, a Sorted LLaMA (arXiv 2309.08968)."""

from typing import Any, ClassVar, Literal

import pydantic
from torch import nn

from models.config import Epsilon, ModelConfig
from models.decoder import Block, Decoder
from models.depth.nested import NestedBlock, NestedDecoder
from models.layers import GatedMLP, Linear, RMSNorm, Rotary
from models.mixers.attention import Attention
from models.rope import RopeParameters, with_rope


class Config(ModelConfig):
    num_attention_heads: int = pydantic.Field(gt=0)
    num_key_value_heads: int | None = pydantic.Field(None, gt=0)
    head_dim: int | None = pydantic.Field(None, gt=0)
    intermediate_size: int = pydantic.Field(gt=0)
    hidden_act: Literal["silu", "gelu", "relu", "gelu_pytorch_tanh"] = "silu"
    rms_norm_eps: Epsilon = 1e-6
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    mlp_bias: bool = False
    pretraining_tp: Literal[1] = 1
    exits: tuple[int, ...] = ()  # layers after which a token may leave; the last layer is one always
    widths: tuple[float, ...] = ()  # shares of heads and hidden units that sub-models have; all is one always
    skipped: Literal["absent", "propagate"] = (
        "propagate"  # what later tokens see at the layers that a token skipped
    )

    aliases: ClassVar[dict[str, str]] = {}

    _rope = pydantic.model_validator(mode="before")(with_rope())

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.num_attention_heads % self.kv_heads:
            heads = f"num_attention_heads = {self.num_attention_heads}"
            raise ValueError(f"{heads} must be a multiple of num_key_value_heads = {self.kv_heads}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads = {self.num_attention_heads}"
            )
        if self.dim % 2:
            raise ValueError(f"head_dim = {self.dim} must be even")
        inside = all(0 < e <= self.num_hidden_layers for e in self.exits)
        if not inside or list(self.exits) != sorted(set(self.exits)):
            raise ValueError(
                f"exits = {list(self.exits)} must rise, from 1 to num_hidden_layers = {self.num_hidden_layers}"
            )
        self._check_widths()
        return self

    def _check_widths(self) -> None:
        if not all(0 < w <= 1 for w in self.widths) or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths = {list(self.widths)} must rise, from above 0 to 1")
        for name, count in (
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.kv_heads),
            ("intermediate_size", self.intermediate_size),
        ):
            for width in self.widths:
                if abs(width * count - round(width * count)) > 1e-6 or round(width * count) == 0:
                    raise ValueError(f"widths: {width:g} of {name} = {count} is not a whole number")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dim(self) -> int:
        """Of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def block(c: Config, kind: type[Block] = Block) -> Block:
    """One layer."""
    attention = Attention(
        c.hidden_size,
        c.num_attention_heads,
        c.kv_heads,
        c.dim,
        rotary=Rotary(c.dim, c.rope_parameters.rope_theta),
        qkv_bias=c.attention_bias,
        out_bias=c.attention_bias,
    )
    mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.hidden_act, bias=c.mlp_bias)
    return kind(
        RMSNorm(c.hidden_size, c.rms_norm_eps), attention, RMSNorm(c.hidden_size, c.rms_norm_eps), mlp
    )


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    kind = NestedBlock if c.widths else Block
    parts: tuple[Any, ...] = (
        nn.Embedding(c.vocab_size, c.hidden_size),
        [block(c, kind) for _ in range(c.num_hidden_layers)],
        RMSNorm(c.hidden_size, c.rms_norm_eps),
        None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False),
    )
    if not (c.exits or c.widths):
        return c, Decoder(*parts)
    widths = sorted({*c.widths, 1.0})
    return c, NestedDecoder(*parts, exits=c.exits, fills=c.skipped == "propagate", widths=widths)


NAMES = (
    (r"^embeddings\.", "model.embed_tokens."),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"\.mixer_norm\.", ".input_layernorm."),
    (r"\.mixer\.", ".self_attn."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
)
