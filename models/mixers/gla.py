"""Gated Linear Attention (arXiv 2312.06635), in flash-linear-attention's checkpoint format."""

from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.outer import outer
from models.batch import Batch
from models.config import ModelConfig
from models.decoder import Block, Decoder
from models.layers import ACTIVATIONS, GatedMLP, Linear, Packed, RMSNorm
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf

GATE_LOGIT_NORMALIZER = 16  # not in the published configurations: the layer's default
GATE_LOW_RANK_DIM = 16


class Config(ModelConfig):
    num_heads: int = pydantic.Field(4, gt=0)
    num_kv_heads: int | None = pydantic.Field(None, gt=0)
    expand_k: float = pydantic.Field(0.5, gt=0)
    expand_v: float = pydantic.Field(1.0, gt=0)
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = pydantic.Field(4, ge=1, le=16)
    use_output_gate: bool = True
    clamp_min: float | None = None
    hidden_act: Literal["swish", "silu"] = "swish"
    hidden_ratio: int | None = 4
    intermediate_size: int | None = None
    elementwise_affine: bool = True
    fuse_norm: bool = True
    norm_eps: float = 1e-6
    attn: None = None
    attnres_block_size: None = None
    use_gk: Literal[True] = True
    use_gv: Literal[False] = False

    @pydantic.field_validator("feature_map")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in ACTIVATIONS:
            raise ValueError(f"must be one of {', '.join(sorted(ACTIVATIONS))}")
        return name

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        for name, value in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = self.hidden_size * value
            if abs(width - round(width)) > 1e-6 or round(width) % self.num_heads:
                raise ValueError(f"hidden_size * {name} = {width:g} must be a multiple of num_heads = {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def key_dim(self) -> int:
        """Of one head."""
        return round(self.hidden_size * self.expand_k) // self.num_heads

    @property
    def value_dim(self) -> int:
        """Of one head."""
        return round(self.hidden_size * self.expand_v) // self.num_heads

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256) * 256


class GLA(nn.Module):
    """S = diag(exp(gk)) S + k v^T; o = K^-1/2 q^T S, normed per head and gated."""

    def __init__(self, c: Config):
        super().__init__()
        H, Hkv, K, V = c.num_heads, c.kv_heads, c.key_dim, c.value_dim
        self.heads, self.kv_heads, self.K, self.V = H, Hkv, K, V
        self.clamp_min = c.clamp_min
        self.feature_map = ACTIVATIONS[c.feature_map or "identity"]
        parts = {"q_proj": H * K, "k_proj": Hkv * K, "v_proj": Hkv * V, "gk_proj.0": GATE_LOW_RANK_DIM}
        if c.use_output_gate:
            parts["g_proj"] = H * V
        self.in_proj = Packed(c.hidden_size, parts)
        self.gk_proj = nn.ModuleDict({"1": Linear(GATE_LOW_RANK_DIM, Hkv * K)})
        if c.use_short_conv:
            self.q_conv1d = ShortConv(H * K, c.conv_size)
            self.k_conv1d = ShortConv(Hkv * K, c.conv_size)
            self.v_conv1d = ShortConv(Hkv * V, c.conv_size)
        self.short_conv = c.use_short_conv
        self.gated = c.use_output_gate
        norm = RMSNorm(V, c.norm_eps, c.elementwise_affine)
        self.norm_name = "g_norm_swish_gate" if c.fuse_norm and c.use_output_gate and c.hidden_act == "swish" else "g_norm"
        self.add_module(self.norm_name, norm)
        self.o_proj = Linear(H * V, c.hidden_size, bias=False)

    def leaves(self) -> LayerLeaves:
        leaves = {"S": Leaf((self.kv_heads, self.K, self.V))}
        if self.short_conv:
            for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
                leaves[name] = getattr(self, name).leaf()
        return leaves

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        q, k, v, low, *gate = self.in_proj(x)
        if self.short_conv:
            q = self.q_conv1d(q, batch, state and state["q_conv1d"])
            k = self.k_conv1d(k, batch, state and state["k_conv1d"])
            v = self.v_conv1d(v, batch, state and state["v_conv1d"])
        gk = F.logsigmoid(self.gk_proj["1"](low).float()) / GATE_LOGIT_NORMALIZER
        if self.clamp_min is not None:
            gk = gk.clamp_min(self.clamp_min)
        o = outer(
            self.feature_map(q).unflatten(-1, (self.heads, self.K)),
            self.feature_map(k).unflatten(-1, (self.kv_heads, self.K)),
            v.unflatten(-1, (self.kv_heads, self.V)),
            gk.unflatten(-1, (self.kv_heads, self.K)),
            None if state is None else state["S"],
            batch.slots,
            batch.depths,
            batch.offsets,
            scale=self.K**-0.5,
        )
        o = getattr(self, self.norm_name)(o).flatten(-2)
        if self.gated:
            o = o * F.silu(gate[0])
        return self.o_proj(o)

    def flops(self) -> int:
        return self.K * self.V * (4 * self.kv_heads + 2 * self.heads)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    layers = [
        Block(
            RMSNorm(c.hidden_size, c.norm_eps),
            GLA(c),
            RMSNorm(c.hidden_size, c.norm_eps),
            GatedMLP(c.hidden_size, c.mlp_size, c.hidden_act),
        )
        for _ in range(c.num_hidden_layers)
    ]
    head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False)
    return c, Decoder(nn.Embedding(c.vocab_size, c.hidden_size), layers, RMSNorm(c.hidden_size, c.norm_eps), head)


# Our names -> the checkpoint's, applied in this order to the names of all parameters.
NAMES = (
    (r"^(embeddings|layers|norm)\.", r"model.\1."),
    (r"\.mixer_norm\.", ".attn_norm."),
    (r"\.mixer\.", ".attn."),
)
