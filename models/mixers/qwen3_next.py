"""Qwen3-Next without experts: Gated DeltaNet and gated attention in turns, in transformers' checkpoint
format."""

from typing import Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import Batch
from models.config import Epsilon, ModelConfig
from models.decoder import Block, Decoder, Mixer
from models.layers import GatedMLP, Linear, OffsetRMSNorm, Packed, Rotary, activation, saved_as
from models.mixers.attention import Attention
from models.mixers.gated_deltanet import GatedDeltaRule
from models.mixers.shortconv import ShortConv
from models.rope import RopeParameters, with_rope
from models.state import LayerState

__all__ = ["NAMES", "Config", "build"]

Kind = Literal["linear_attention", "full_attention"]


class Config(ModelConfig):
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "attention_dropout", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
            "output_router_logits", "router_aux_loss_coef", "shared_expert_intermediate_size",
        }
    )  # fmt: skip

    intermediate_size: int = pydantic.Field(5632, gt=0)
    num_attention_heads: int = pydantic.Field(16, gt=0)
    num_key_value_heads: int = pydantic.Field(2, gt=0)
    head_dim: int = pydantic.Field(256, gt=0)
    hidden_act: str = "silu"  # of the MLPs and the convolutions
    rms_norm_eps: Epsilon = 1e-6
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.25)
    attention_bias: bool = False
    linear_conv_kernel_dim: int = pydantic.Field(4, ge=1, le=16)
    linear_key_head_dim: int = pydantic.Field(128, gt=0)
    linear_value_head_dim: int = pydantic.Field(128, gt=0)
    linear_num_key_heads: int = pydantic.Field(16, gt=0)
    linear_num_value_heads: int = pydantic.Field(32, gt=0)
    num_experts: int = pydantic.Field(512, ge=0)
    decoder_sparse_step: int = pydantic.Field(1, gt=0)
    mlp_only_layers: tuple[int, ...] = ()
    layer_types: tuple[Kind, ...] | None = None
    full_attention_interval: int = pydantic.Field(4, gt=0)

    _rope = pydantic.model_validator(mode="before")(with_rope(partial=0.25))

    @pydantic.field_validator("mlp_only_layers", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return () if value is None else value

    _activation = pydantic.field_validator("hidden_act")(activation)

    @pydantic.model_validator(mode="after")
    def _no_experts(self) -> "Config":
        step, dense = self.decoder_sparse_step, self.mlp_only_layers
        sparse = [i for i in range(self.num_hidden_layers) if (i + 1) % step == 0 and i not in dense]
        if self.num_experts and sparse:
            raise ValueError(
                f"num_experts = {self.num_experts}: must be 0, or every layer in mlp_only_layers or left out by "
                f"decoder_sparse_step: layer {sparse[0]} is a mixture of experts, which is not supported"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        for ours, theirs in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, ours) % getattr(self, theirs):
                raise ValueError(f"{ours} = {getattr(self, ours)} must be a multiple of {theirs}")
        if len(self.kinds) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.kinds)} entries for {self.num_hidden_layers} layers")
        self.rope_parameters.width(self.head_dim)
        return self

    @property
    def kinds(self) -> tuple[Kind, ...]:
        if self.layer_types is not None:
            return self.layer_types
        layers = range(1, self.num_hidden_layers + 1)
        return tuple(
            "linear_attention" if i % self.full_attention_interval else "full_attention" for i in layers
        )


class GatedDeltaNet(GatedDeltaRule):
    """Its projections lie together by head of keys: q, k, the values that share them, their gates; and b,
    a."""

    def __init__(self, c: Config):
        heads, value_heads = c.linear_num_key_heads, c.linear_num_value_heads
        K, V = c.linear_key_head_dim, c.linear_value_head_dim
        super().__init__(heads, value_heads, K, V, c.rms_norm_eps, neg_eigval=False)
        saved_as("norm", self.o_norm)
        group = value_heads // heads
        self.by_head = K, K, group * V, group * V
        self.in_proj = Packed(
            c.hidden_size, {"in_proj_qkvz": heads * sum(self.by_head), "in_proj_ba": 2 * value_heads}
        )
        self.conv = ShortConv({"conv1d": sum(self.qkv)}, c.linear_conv_kernel_dim, activation=c.hidden_act)
        self.out_proj = Linear(value_heads * V, c.hidden_size, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        qkvz, ba = self.in_proj(x)
        q, k, v, z = qkvz.unflatten(-1, (self.heads, -1)).split(self.by_head, -1)
        b, a = ba.unflatten(-1, (self.heads, -1)).chunk(2, -1)
        qkv = torch.cat([y.flatten(-2) for y in (q, k, v)], -1)
        return qkv, a.flatten(-2), b.flatten(-2), z.flatten(-2)

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.out_proj(o.flatten(-2) * F.silu(gate))


class GatedAttention(Attention):
    """With a gate for every channel of its output, projected beside each head's query."""

    def __init__(self, c: Config):
        heads, shared, dim, eps = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps
        rope = c.rope_parameters
        super().__init__(
            c.hidden_size,
            heads,
            shared,
            dim,
            rotary=Rotary(rope.width(dim), rope.rope_theta),
            out_bias=c.attention_bias,
            q_norm=OffsetRMSNorm(dim, eps),
            k_norm=OffsetRMSNorm(dim, eps),
        )
        parts = {"q_proj": 2 * heads * dim, "k_proj": shared * dim, "v_proj": shared * dim}
        self.qkv = Packed(c.hidden_size, parts, bias=c.attention_bias)

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        both, k, v = self.qkv(x)
        q, gate = both.unflatten(-1, (self.heads, -1)).chunk(2, -1)
        k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (k, v))
        q, k, v = self.prepared(q, k, v, batch.positions)
        o = self.attend(q, k, v, batch, state)
        return self.o_proj((o * torch.sigmoid(gate)).flatten(-2))


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    D, eps = c.hidden_size, c.rms_norm_eps

    def block(kind: Kind) -> Block:
        full = kind == "full_attention"
        mixer: Mixer = (
            saved_as("self_attn", GatedAttention(c)) if full else saved_as("linear_attn", GatedDeltaNet(c))
        )
        return Block(
            OffsetRMSNorm(D, eps),
            mixer,
            OffsetRMSNorm(D, eps),
            GatedMLP(D, c.intermediate_size, c.hidden_act),
        )

    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    embeddings, norm = nn.Embedding(c.vocab_size, D), OffsetRMSNorm(D, eps)
    return c, Decoder(embeddings, [block(kind) for kind in c.kinds], norm, head)


NAMES = (
    (r"^embeddings\.", "model.embed_tokens."),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"\.mixer_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
)
