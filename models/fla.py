"""What the checkpoints of flash-linear-attention have in common: the frame of blocks around a mixer."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import Epsilon, ModelConfig, one_of
from models.decoder import Block, Decoder, Mixer
from models.layers import GatedMLP, Linear, RMSNorm, Rotary
from models.mixers.attention import Attention

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "logsigmoid": F.logsigmoid,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
    "swish": F.silu,
}
"""By the names that they have in that library."""

QK_NORM_EPS = 1e-5  # not in the published configurations: the layer's default

Mixers = Callable[[int], Mixer]  # index of a layer -> its mixer


class AttentionSpec(pydantic.BaseModel):
    """Softmax attention in place of the family's own mixer, at some layers."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...]
    num_heads: int = pydantic.Field(gt=0)
    num_kv_heads: int | None = pydantic.Field(None, gt=0)
    qkv_bias: bool = False
    window_size: int | None = pydantic.Field(None, gt=0)
    rope_theta: float = pydantic.Field(10000.0, gt=0)

    def mixer(self, hidden: int, qk_norm: bool = False) -> Attention:
        dim = hidden // self.num_heads
        return Attention(
            hidden,
            self.num_heads,
            self.num_kv_heads or self.num_heads,
            dim,
            rotary=Rotary(dim, self.rope_theta),
            window=self.window_size,
            qkv_bias=self.qkv_bias,
            q_norm=RMSNorm(dim, QK_NORM_EPS) if qk_norm else None,
            k_norm=RMSNorm(dim, QK_NORM_EPS) if qk_norm else None,
        )


class FLAConfig(ModelConfig):
    """Keys of every family of that library whose blocks are norm, mixer, norm, gated MLP."""

    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "attn_mode",  # which of its kernels
            "fuse_cross_entropy",
            "fuse_linear_cross_entropy",
            "fuse_norm",
            "fuse_swiglu",
            "initializer_range",
            "max_position_embeddings",  # sizes a table of rotations that grows where needed
            "use_l2warp",
        }
    )

    hidden_ratio: float | None = pydantic.Field(4, gt=0)
    intermediate_size: int | None = pydantic.Field(None, gt=0)
    hidden_act: str = "swish"
    norm_eps: Epsilon = 1e-6
    attn: AttentionSpec | tuple[AttentionSpec, ...] | None = None
    attnres_block_size: None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @pydantic.field_validator("hidden_act")
    @classmethod
    def _gated(cls, name: str) -> str:
        return one_of(name, ("swish", "silu"))

    @pydantic.model_validator(mode="after")
    def _attention(self) -> Self:
        seen = [layer for spec in self.attention for layer in spec.layers]
        if len(seen) != len(set(seen)) or not all(0 <= i < self.num_hidden_layers for i in seen):
            raise ValueError(
                f"attn.layers = {seen}: each of the {self.num_hidden_layers} layers at most once"
            )
        for spec in self.attention:
            heads, shared = spec.num_heads, spec.num_kv_heads or spec.num_heads
            if self.hidden_size % heads or heads % shared or self.hidden_size // heads % 2:
                raise ValueError(
                    f"attn: num_heads = {heads} must be a multiple of num_kv_heads = {shared}, and cut "
                    f"hidden_size = {self.hidden_size} into heads of even width"
                )
        return self

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        return (self.attn,) if isinstance(self.attn, AttentionSpec) else self.attn or ()

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256) * 256


class HeadsConfig(FLAConfig):
    """Heads whose keys and values are expanded by a factor; groups of heads may share keys and values."""

    num_heads: int = pydantic.Field(4, gt=0)
    num_kv_heads: int | None = pydantic.Field(None, gt=0)
    expand_k: float = pydantic.Field(1.0, gt=0)
    expand_v: float = pydantic.Field(1.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.kv_heads}"
            )
        self.head_width("expand_k", self.expand_k)
        self.head_width("expand_v", self.expand_v)
        return self

    def head_width(self, name: str, ratio: float) -> int:
        """hidden_size * ratio, cut into heads. Raises ValueError where that is no whole number."""
        width = self.hidden_size * ratio
        if abs(width - round(width)) > 1e-6 * width or round(width) % self.num_heads or not round(width):
            raise ValueError(
                f"hidden_size * {name} = {width:g} must be a multiple of num_heads = {self.num_heads}"
            )
        return round(width) // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def key_dim(self) -> int:
        """Of one head."""
        return self.head_width("expand_k", self.expand_k)

    @property
    def value_dim(self) -> int:
        """Of one head."""
        return self.head_width("expand_v", self.expand_v)


def activation(name: str | None) -> str | None:
    """For validators: the name of an elementwise function, or None."""
    return None if name is None else one_of(name, ACTIVATIONS)


def divided(c: ModelConfig, name: str, heads: int) -> None:
    """For validators: that hidden_size is a multiple of a number of heads."""
    if c.hidden_size % heads:
        raise ValueError(f"hidden_size = {c.hidden_size} must be a multiple of {name} = {heads}")


def hybrid(c: FLAConfig, mixer: Mixers) -> Mixers:
    """The mixer of each layer: attention where the configuration has it, the family's own elsewhere."""
    by_layer = {layer: spec for spec in c.attention for layer in spec.layers}

    def of(layer: int) -> Mixer:
        return by_layer[layer].mixer(c.hidden_size) if layer in by_layer else mixer(layer)

    return of


def decoder(c: FLAConfig, mixer: Mixers) -> Decoder:
    """Blocks of norm, mixer, norm, gated MLP between embedding, final norm and head."""
    D, mixers = c.hidden_size, hybrid(c, mixer)
    blocks = [
        Block(
            RMSNorm(D, c.norm_eps),
            mixers(i),
            RMSNorm(D, c.norm_eps),
            GatedMLP(D, c.mlp_size, c.hidden_act),
        )
        for i in range(c.num_hidden_layers)
    ]
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    return Decoder(nn.Embedding(c.vocab_size, D), blocks, RMSNorm(D, c.norm_eps), head)


# Our names -> the checkpoint's, applied in this order to the names of all parameters.
NAMES = (
    (r"^(embeddings|layers|norm)\.", r"model.\1."),
    (r"\.mixer_norm\.", ".attn_norm."),
    (r"\.mixer\.", ".attn."),
)
