"""RecurrentGemma (Griffin, arXiv 2402.19427, 2404.07839), in transformers' checkpoint format."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonal.linear import gated
from kernels.invariance import invariant_baddbmm
from models.batch import Batch
from models.config import Epsilon, ModelConfig
from models.decoder import Block, Decoder, Mixer
from models.layers import (
    ACTIVATIONS,
    GatedMLP,
    Linear,
    OffsetRMSNorm,
    Packed,
    Parted,
    Rotary,
    activation,
    saved_as,
)
from models.mixers.attention import Attention
from models.mixers.shortconv import ShortConv
from models.rope import RopeParameters, with_rope
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "RGLRU", "Config", "build"]

SHARPNESS = 8.0  # c of the paper's equation 3


class Config(ModelConfig):
    aliases: ClassVar[dict[str, str]] = {"sliding_window": "attention_window_size"}
    inert: ClassVar[frozenset[str]] = frozenset(
        {"attention_dropout", "final_w_init_variance_scale", "w_init_variance_scale"}
    )

    num_attention_heads: int = pydantic.Field(10, gt=0)
    num_key_value_heads: int | None = pydantic.Field(None, gt=0)
    head_dim: int | None = pydantic.Field(None, gt=0)
    intermediate_size: int = pydantic.Field(3 * 2560, gt=0)  # of gate and up together
    lru_width: int | None = pydantic.Field(None, gt=0)
    attention_window_size: int = pydantic.Field(2048, gt=0)
    conv1d_width: int = pydantic.Field(4, ge=1, le=16)
    logits_soft_cap: float = pydantic.Field(30.0, gt=0)
    rms_norm_eps: Epsilon = 1e-6
    hidden_activation: str = "gelu_pytorch_tanh"
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    block_types: tuple[Literal["recurrent", "attention"], ...] = ("recurrent", "recurrent", "attention")
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1

    _rope = pydantic.model_validator(mode="before")(with_rope(partial=0.5))

    _activation = pydantic.field_validator("hidden_activation")(activation)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        heads, shared = self.num_attention_heads, self.kv_heads
        if heads % shared:
            raise ValueError(
                f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {shared}"
            )
        for name, width in (("hidden_size", self.hidden_size), ("lru_width", self.width)):
            if width % heads and not (name == "hidden_size" and self.head_dim):
                raise ValueError(f"{name} = {width} must be a multiple of num_attention_heads = {heads}")
        if not self.block_types:
            raise ValueError("block_types must not be empty")
        self.rope_parameters.width(self.dim)
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dim(self) -> int:
        """Of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def width(self) -> int:
        return self.lru_width or self.hidden_size


class Gates(Parted):
    """The input gate and the recurrence gate, each a matrix and a bias for every head, as one batched
    product."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(heads, width, 2 * width))
        self.bias = nn.Parameter(torch.empty(heads, 1, 2 * width))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for i, name in enumerate(("input_gate", "recurrent_gate")):
            at = slice(i * self.width, (i + 1) * self.width)
            yield f"rg_lru.{name}_weight", self.weight[:, :, at]
            yield f"rg_lru.{name}_bias", self.bias[:, 0, at]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, C] -> both [T, C], float32."""
        heads = x.unflatten(-1, (-1, self.width)).transpose(0, 1)  # [H, T, width]
        both = torch.sigmoid(invariant_baddbmm(self.bias, heads, self.weight).float()).transpose(0, 1)
        update, recurrence = both.split(self.width, -1)
        return update.flatten(-2), recurrence.flatten(-2)


class RGLRU(Mixer):
    """h = a h + sqrt(1 - a^2) (i x) with a = exp(-8 softplus(Lambda) r), behind a convolution, times a gelu
    branch; the first token of a sequence enters whole."""

    def __init__(self, c: Config):
        super().__init__()
        self.width = c.width
        self.in_proj = Packed(c.hidden_size, {"linear_y": c.width, "linear_x": c.width}, bias=True)
        self.conv = ShortConv({"conv_1d": c.width}, c.conv1d_width, bias=True, activation=None)
        self.gates = Gates(c.num_attention_heads, c.width // c.num_attention_heads)
        self.rg_lru = nn.ParameterDict({"recurrent_param": nn.Parameter(torch.empty(c.width))})
        self.linear_out = Linear(c.width, c.hidden_size)
        self.activation = ACTIVATIONS[c.hidden_activation]
        self._rate: Tensor | None = None

    def prepare(self) -> None:
        self._rate = self._decay_rate()

    def _decay_rate(self) -> Tensor:
        return -SHARPNESS * F.softplus(self.rg_lru["recurrent_param"].float())

    def leaves(self) -> LayerLeaves:
        return {"h": Leaf((self.width,)), "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        y, x = self.in_proj(x)
        x = self.conv(x, batch, pool_of(state, "conv"))
        update, recurrence = self.gates(x)
        log_a = recurrence * (self._decay_rate() if self._rate is None else self._rate)
        first = (batch.positions == 0).unsqueeze(-1)
        size = torch.where(first, 1.0, torch.sqrt(-torch.expm1(2 * log_a)))
        h = gated(log_a, x * update * size, pool_of(state, "h"), *batch.index).to(x.dtype)
        return self.linear_out(h * self.activation(y))

    def flops(self) -> int:
        return 2 * self.width


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    D, eps, rope = c.hidden_size, c.rms_norm_eps, c.rope_parameters

    def mixer(layer: int) -> Mixer:
        if c.block_types[layer % len(c.block_types)] == "recurrent":
            return RGLRU(c)
        return Attention(
            D,
            c.num_attention_heads,
            c.kv_heads,
            c.dim,
            rotary=Rotary(rope.width(c.dim), rope.rope_theta),
            window=c.attention_window_size,
            qkv_bias=c.attention_bias,
            out_bias=True,
        )

    blocks = []
    for i in range(c.num_hidden_layers):
        mlp = GatedMLP(D, c.intermediate_size // 2, c.hidden_activation, bias=True)
        blocks.append(Block(OffsetRMSNorm(D, eps), mixer(i), OffsetRMSNorm(D, eps), mlp))
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    scale = torch.tensor(D**0.5, dtype=torch.bfloat16, device="cpu").item()  # so it was trained
    embeddings, norm = nn.Embedding(c.vocab_size, D), saved_as("final_norm", OffsetRMSNorm(D, eps))
    return c, Decoder(embeddings, blocks, norm, head, embedding_scale=scale, logit_softcap=c.logits_soft_cap)


NAMES = (
    (r"^embeddings\.", "model.embed_tokens."),
    (r"^(layers|final_norm)\.", r"model.\1."),
    (r"\.mixer_norm\.", ".temporal_pre_norm."),
    (r"\.mixer\.", ".temporal_block."),
    (r"\.mlp_norm\.", ".channel_pre_norm."),
    (r"\.mlp\.", ".mlp_block."),
)
