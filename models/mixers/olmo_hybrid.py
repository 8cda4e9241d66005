"""OLMo Hybrid: Gated DeltaNet with full attention at some layers, in transformers' checkpoint format."""

from typing import Any, ClassVar, Literal

import pydantic
from torch import Tensor, nn

from models.batch import Batch
from models.config import Epsilon, ModelConfig
from models.decoder import Block, Decoder, Mixer
from models.layers import GatedMLP, Linear, RMSNorm, Rotary, activation, saved_as
from models.mixers.attention import Attention
from models.mixers.gated_deltanet import GatedDeltaNet
from models.rope import RopeParameters
from models.state import LayerState

__all__ = ["NAMES", "Config", "build"]

OUTPUT_NORM_EPS = 1e-5  # of the linear layers' output norm: rms_norm_eps is not handed to it

Kind = Literal["linear_attention", "full_attention"]


class Config(ModelConfig):
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "attention_dropout", "linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor",
            "linear_dt_max", "linear_dt_min",
        }
    )  # fmt: skip

    intermediate_size: int = pydantic.Field(11008, gt=0)
    num_attention_heads: int = pydantic.Field(30, gt=0)
    num_key_value_heads: int | None = pydantic.Field(None, gt=0)
    head_dim: int | None = pydantic.Field(None, gt=0)
    hidden_act: str = "silu"  # of the MLPs and the convolutions
    rms_norm_eps: Epsilon = 1e-6
    rope_parameters: RopeParameters | None = None  # None: no positions but what the linear layers give
    attention_bias: bool = False
    layer_types: tuple[Kind, ...] | None = None
    linear_num_key_heads: int | None = pydantic.Field(None, gt=0)
    linear_num_value_heads: int | None = pydantic.Field(None, gt=0)
    linear_key_head_dim: int | None = pydantic.Field(None, gt=0)
    linear_value_head_dim: int | None = pydantic.Field(None, gt=0)
    linear_conv_kernel_dim: int = pydantic.Field(4, ge=1, le=16)
    linear_allow_neg_eigval: bool = True
    eos_token_id: int | list[int] | None = 100257

    _activation = pydantic.field_validator("hidden_act")(activation)

    @pydantic.field_validator("rope_parameters", mode="before")
    @classmethod
    def _without_theta(cls, value: Any) -> Any:
        return None if isinstance(value, dict) and value.get("rope_theta") is None else value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        heads, shared = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % shared:
            raise ValueError(
                f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {shared}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} must be a multiple of num_attention_heads = {heads}"
            )
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"linear_num_value_heads = {self.value_heads} must be a multiple of {self.key_heads}"
            )
        if len(self.kinds) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.kinds)} entries for {self.num_hidden_layers} layers")
        return self

    @property
    def key_heads(self) -> int:
        return self.linear_num_key_heads or self.num_attention_heads

    @property
    def value_heads(self) -> int:
        return self.linear_num_value_heads or self.num_attention_heads

    @property
    def key_dim(self) -> int:
        return self.linear_key_head_dim or int(0.75 * self.hidden_size / self.key_heads)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        if self.layer_types is not None:
            return self.layer_types
        kinds: list[Kind] = [
            "full_attention" if i % 4 == 3 else "linear_attention" for i in range(self.num_hidden_layers)
        ]
        if "full_attention" not in kinds:
            kinds[-1] = "full_attention"
        return tuple(kinds)


class PostNormBlock(Block):
    """x + norm(mixer(x)), then x + norm(mlp(x))."""

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        assert self.mlp is not None and self.mlp_norm is not None
        x = x + self.mixer_norm(self.mixer(x, batch, state))
        return x + self.mlp_norm(self.mlp(x))

    def fill(self, x: Tensor, batch: Batch, state: LayerState | None) -> None:
        self.mixer.write(x, batch, state)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    D, eps = c.hidden_size, c.rms_norm_eps
    blocks = [_attention_block(c) if kind == "full_attention" else _linear_block(c) for kind in c.kinds]
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    return c, Decoder(nn.Embedding(c.vocab_size, D), blocks, RMSNorm(D, eps), head)


def _linear_block(c: Config) -> Block:
    D, eps = c.hidden_size, c.rms_norm_eps
    mixer = GatedDeltaNet(
        D,
        c.key_heads,
        c.value_heads,
        c.key_dim,
        c.linear_value_head_dim or 2 * c.key_dim,
        norm_eps=OUTPUT_NORM_EPS,
        conv_size=c.linear_conv_kernel_dim,
        neg_eigval=c.linear_allow_neg_eigval,
        fused_conv=True,
        activation=c.hidden_act,
    )
    return Block(
        saved_as("attention_layer_norm|input_layernorm", RMSNorm(D, eps)),
        saved_as("linear_attn", mixer),
        saved_as("feedforward_layer_norm|post_attention_layernorm", RMSNorm(D, eps)),
        GatedMLP(D, c.intermediate_size, c.hidden_act),
    )


def _attention_block(c: Config) -> Block:
    D, eps, heads = c.hidden_size, c.rms_norm_eps, c.num_attention_heads
    shared, dim = c.num_key_value_heads or heads, c.head_dim or D // heads
    rope = c.rope_parameters
    mixer: Mixer = Attention(
        D,
        heads,
        shared,
        dim,
        rotary=None if rope is None else Rotary(dim, rope.rope_theta),
        qkv_bias=c.attention_bias,
        out_bias=c.attention_bias,
        q_norm=RMSNorm(heads * dim, eps),
        k_norm=RMSNorm(shared * dim, eps),
        norm_heads=False,
    )
    return PostNormBlock(
        saved_as("post_attention_layernorm|feedforward_layer_norm", RMSNorm(D, eps)),
        saved_as("self_attn", mixer),
        saved_as("post_feedforward_layernorm", RMSNorm(D, eps)),
        GatedMLP(D, c.intermediate_size, c.hidden_act),
    )


NAMES = ((r"^embeddings\.", "model.embed_tokens."), (r"^(layers|norm)\.", r"model.\1."))
