"""DeltaNet (arXiv 2406.06484), also with negative eigenvalues (2411.12537), in flash-linear-attention's
format."""

from typing import Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta import delta
from kernels.invariance import by_row
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.fla import NAMES, HeadsConfig, decoder
from models.layers import Linear, Packed, RMSNorm, l2norm
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Config", "DeltaNet", "build"]


class Config(HeadsConfig):
    inert: ClassVar[frozenset[str]] = frozenset({"use_output_norm"})  # its layers always norm

    num_heads: int = pydantic.Field(16, gt=0)
    num_kv_heads: None = None
    use_gate: bool = False
    use_beta: bool = True
    use_short_conv: bool = True
    conv_size: int = pydantic.Field(4, ge=1, le=16)
    allow_neg_eigval: bool = False
    qk_norm: Literal["l2", "sum"] = "l2"
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"


class DeltaNet(Mixer):
    """S = S + beta k (v - S^T k)^T with keys of norm 1; o = K^-1/2 q^T S, normed per head."""

    def __init__(self, c: Config):
        super().__init__()
        H, K, V = c.num_heads, c.key_dim, c.value_dim
        self.heads, self.K, self.V = H, K, V
        self.strength = 2.0 if c.allow_neg_eigval else 1.0
        self.activation, self.norm = c.qk_activation, c.qk_norm
        parts = {"q_proj": H * K, "k_proj": H * K, "v_proj": H * V}
        convolved = {"q_conv1d": H * K, "k_conv1d": H * K, "v_conv1d": H * V}
        self.sizes = [2 * H * K + H * V]
        if c.use_beta:
            parts["b_proj"] = H
        if c.use_gate:
            parts["g_proj"] = H * V
        self.in_proj = Packed(c.hidden_size, parts)
        self.beta, self.gated = c.use_beta, c.use_gate
        # SiLU belongs to the convolution where all of its channels take it.
        self.conv_silu = c.use_short_conv and c.qk_activation == "silu"
        activation = "silu" if self.conv_silu else None
        self.conv = ShortConv(convolved, c.conv_size, activation=activation) if c.use_short_conv else None
        self.o_norm = RMSNorm(V, c.norm_eps)
        self.o_proj = Linear(H * V, c.hidden_size, bias=False)

    def leaves(self) -> LayerLeaves:
        S = Leaf((self.heads, self.K, self.V))
        return {"S": S} if self.conv is None else {"S": S, "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        qkv, *rest = self.in_proj(x, [*self.sizes, *self.in_proj.sizes[3:]])
        if self.conv is not None:
            qkv = self.conv(qkv, batch, pool_of(state, "conv"))
        qk, v = qkv.split((2 * self.heads * self.K, self.heads * self.V), -1)
        q, k = self._normed(qk.unflatten(-1, (-1, self.K))).chunk(2, 1)
        v = (v if self.conv_silu else F.silu(v)).unflatten(-1, (self.heads, self.V))
        beta = by_row(torch.sigmoid, rest[0].float()) if self.beta else x.new_ones(x.shape[0], self.heads)
        o = delta(q, k, v, beta * self.strength, None, pool_of(state, "S"), *batch.index, scale=self.K**-0.5)
        o = self.o_norm(o).flatten(-2)
        return self.o_proj(o * F.silu(rest[-1]) if self.gated else o)

    def _normed(self, qk: Tensor) -> Tensor:
        """Queries and keys [T, 2 H, K] through their activation and norm."""
        if self.activation == "silu" and not self.conv_silu:
            qk = F.silu(qk)
        elif self.activation == "relu":
            qk = F.relu(qk)
        elif self.activation == "elu":
            qk = F.elu(qk) + 1
        return l2norm(qk) if self.norm == "l2" else F.normalize(qk, p=1.0, dim=-1, eps=1e-6)

    def flops(self) -> int:
        return 7 * self.heads * self.K * self.V


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda i: DeltaNet(c))
