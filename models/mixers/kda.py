"""Kimi Delta Attention (arXiv 2510.26692), in flash-linear-attention's checkpoint format."""

from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.delta import delta
from kernels.invariance import by_row
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.fla import NAMES, decoder
from models.layers import Linear, Packed, RMSNorm, l2norm, saved_as
from models.mixers.gated_deltanet import DeltaHeadsConfig
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["KDA", "NAMES", "Config", "build"]


class Config(DeltaHeadsConfig):
    head_dim: int = pydantic.Field(128, gt=0)
    num_heads: int = pydantic.Field(16, gt=0)
    expand_v: float = pydantic.Field(1.0, gt=0)
    safe_gate: bool = False
    lower_bound: float | None = pydantic.Field(None, lt=0)

    @pydantic.model_validator(mode="after")
    def _bounded(self) -> "Config":
        if self.safe_gate and (self.lower_bound is None or self.lower_bound < -5):
            raise ValueError(f"safe_gate needs a lower_bound from -5, got {self.lower_bound}")
        return self


class KDA(Mixer):
    """The gated delta rule with a decay for every key channel: S* = diag(exp(g)) S, S = S* + beta k (v - S*^T
    k)^T.

    g = -exp(A_log) softplus(f + dt_bias), or with a lower bound, bound * sigmoid(exp(A_log) (f + dt_bias)).
    """

    def __init__(self, c: Config):
        super().__init__()
        H, Hv, K, V = c.num_heads, c.value_heads, c.head_dim, c.value_dim
        self.heads, self.value_heads, self.K, self.V = H, Hv, K, V
        self.strength = 2.0 if c.allow_neg_eigval else 1.0
        self.lower_bound = c.lower_bound
        self.qkv = H * K, H * K, Hv * V
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), self.qkv, strict=True))
        self.in_proj = Packed(c.hidden_size, {**parts, "f_proj.0": V, "b_proj": Hv, "g_proj.0": V})
        convolved = dict(zip(("q_conv1d", "k_conv1d", "v_conv1d"), self.qkv, strict=True))
        self.conv = ShortConv(convolved, c.conv_size) if c.use_short_conv else None
        self.f_up = saved_as("f_proj.1", Linear(V, Hv * K, bias=False))
        self.g_up = saved_as("g_proj.1", Linear(V, Hv * V))
        self.A_log = nn.Parameter(torch.empty(Hv))
        self.dt_bias = nn.Parameter(torch.empty(Hv * K))
        self.o_norm = RMSNorm(V, c.norm_eps)
        self.o_proj = Linear(Hv * V, c.hidden_size, bias=False)
        self._A: Tensor | None = None

    def prepare(self) -> None:
        self._A = self.A_log.float().exp().unsqueeze(-1)  # [Hv, 1]

    def leaves(self) -> LayerLeaves:
        S = Leaf((self.value_heads, self.K, self.V))
        return {"S": S} if self.conv is None else {"S": S, "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        qkv, f, b, g = self.in_proj(x, (sum(self.qkv), *self.in_proj.sizes[3:]))
        qkv = F.silu(qkv) if self.conv is None else self.conv(qkv, batch, pool_of(state, "conv"))
        qk, v = qkv.split((2 * self.qkv[0], self.qkv[2]), -1)
        q, k = l2norm(qk.unflatten(-1, (-1, self.K))).chunk(2, 1)
        o = delta(
            q,
            k,
            v.unflatten(-1, (self.value_heads, self.V)),
            by_row(torch.sigmoid, b.float()) * self.strength,
            self._log_decay(self.f_up(f)),
            pool_of(state, "S"),
            *batch.index,
            scale=self.K**-0.5,
        )
        return self.o_proj(self.o_norm(o).flatten(-2) * torch.sigmoid(self.g_up(g)))

    def _log_decay(self, f: Tensor) -> Tensor:
        """f [T, Hv * K] -> [T, Hv, K]."""
        f = (f.float() + self.dt_bias.float()).unflatten(-1, (self.value_heads, self.K))
        A = self.A_log.float().exp().unsqueeze(-1) if self._A is None else self._A
        if self.lower_bound is not None:
            return self.lower_bound * torch.sigmoid(A * f)
        return -A * F.softplus(f)

    def flops(self) -> int:
        return 8 * self.value_heads * self.K * self.V


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda i: KDA(c))
