"""Gated slot attention (arXiv 2409.07146), in flash-linear-attention's checkpoint format."""

from typing import Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.outer.gsa import gsa
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.fla import NAMES, HeadsConfig, decoder
from models.layers import Linear, Packed, RMSNorm
from models.mixers.linear_attn import FeatureMap
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["GSA", "NAMES", "Config", "build"]

NORM_EPS = 1e-5  # of the norm before the output projection: the published code does not hand norm_eps to it


class Config(HeadsConfig):
    aliases: ClassVar[dict[str, str]] = {"exapnd_k": "expand_k", "exapnd_v": "expand_v"}  # as it spells them
    inert: ClassVar[frozenset[str]] = frozenset({"clamp_max", "clamp_min", "use_norm", "use_output_gate"})

    num_slots: int | None = pydantic.Field(64, gt=0)
    gate_logit_normalizer: float = pydantic.Field(8, gt=0)
    feature_map: Literal["swish", "relu", "t2r"] = "swish"
    use_short_conv: bool = False
    conv_size: int = pydantic.Field(4, ge=1, le=16)
    elementwise_affine: bool = True

    @pydantic.field_validator("expand_v")
    @classmethod
    def _one(cls, ratio: float) -> float:
        if ratio != 1:  # its norm is over hidden_size channels
            raise ValueError("must be 1")
        return ratio


class GSA(Mixer):
    """A softmax over M slots between two states: Hk [K, M] finds the slots, Hv [M, V] holds their values."""

    def __init__(self, c: Config):
        super().__init__()
        H, Hkv, K, V, M = c.num_heads, c.kv_heads, c.key_dim, c.value_dim, c.num_slots or c.key_dim
        self.heads, self.kv_heads, self.K, self.V, self.M = H, Hkv, K, V, M
        self.normalizer = c.gate_logit_normalizer
        self.qkv = H * K, Hkv * K, Hkv * V
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), self.qkv, strict=True))
        self.in_proj = Packed(c.hidden_size, {**parts, "f_proj": Hkv * M})
        convolved = dict(zip(("q_conv1d", "k_conv1d", "v_conv1d"), self.qkv, strict=True))
        self.conv = ShortConv(convolved, c.conv_size) if c.use_short_conv else None
        self.feature_map = FeatureMap(c.feature_map, K)
        self.g_norm = RMSNorm(H * V, NORM_EPS, c.elementwise_affine)
        self.o_proj = Linear(H * V, c.hidden_size, bias=False)

    def leaves(self) -> LayerLeaves:
        Hk, Hv = Leaf((self.kv_heads, self.K, self.M)), Leaf((self.kv_heads, self.M, self.V))
        return {"Hk": Hk, "Hv": Hv} if self.conv is None else {"Hk": Hk, "Hv": Hv, "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        qkv, f = self.in_proj(x, (sum(self.qkv), self.kv_heads * self.M))
        if self.conv is not None:
            qkv = self.conv(qkv, batch, pool_of(state, "conv"))
        q, k, v = qkv.split(self.qkv, -1)
        g = F.logsigmoid(f.float()).unflatten(-1, (self.kv_heads, self.M)) / self.normalizer
        o = gsa(
            self.feature_map(q.unflatten(-1, (self.heads, self.K))),
            self.feature_map(k.unflatten(-1, (self.kv_heads, self.K))),
            F.silu(v).unflatten(-1, (self.kv_heads, self.V)),
            -torch.expm1(g),
            g,
            pool_of(state, "Hk"),
            pool_of(state, "Hv"),
            *batch.index,
            scale=1.0,
        )
        return self.o_proj(self.g_norm(F.silu(o.flatten(-2))))

    def flops(self) -> int:
        slots = self.M * (self.K + self.V) * (4 * self.kv_heads + 2 * self.heads)
        return slots + self.feature_map.flops(self.heads + self.kv_heads - 1)  # once it counts already


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda i: GSA(c))
