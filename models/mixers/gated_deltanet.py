"""Gated DeltaNet (arXiv 2412.06464), in flash-linear-attention's checkpoint format."""

from typing import Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.delta import delta
from kernels.invariance import by_row
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.fla import NAMES, FLAConfig, decoder
from models.layers import Linear, Packed, RMSNorm, l2norm
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Config", "GatedDeltaNet", "GatedDeltaRule", "build"]


class DeltaHeadsConfig(FLAConfig):
    """Heads of given width; several heads of values may share those of queries and keys."""

    head_dim: int = pydantic.Field(256, gt=0)
    num_heads: int = pydantic.Field(6, gt=0)
    num_v_heads: int | None = pydantic.Field(None, gt=0)
    expand_v: float = pydantic.Field(2.0, gt=0)
    use_short_conv: bool = True
    conv_size: int = pydantic.Field(4, ge=1, le=16)
    allow_neg_eigval: bool = False

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "DeltaHeadsConfig":
        if self.value_heads % self.num_heads:
            raise ValueError(
                f"num_v_heads = {self.value_heads} must be a multiple of num_heads = {self.num_heads}"
            )
        if abs(self.head_dim * self.expand_v - self.value_dim) > 1e-5 * self.value_dim or not self.value_dim:
            raise ValueError(
                f"head_dim * expand_v = {self.head_dim * self.expand_v:g} must be a whole number"
            )
        return self

    @property
    def value_heads(self) -> int:
        return self.num_v_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        """Of one head."""
        return int(self.head_dim * self.expand_v)


class Config(DeltaHeadsConfig):
    use_gate: bool = True
    output_gate_activation: Literal["swish", "silu", "sigmoid"] = "swish"


class GatedDeltaRule(Mixer):
    """S* = exp(g) S, S = S* + beta k (v - S*^T k)^T with keys of norm 1; o = K^-1/2 q^T S, normed per head,
    gated.

    g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), perhaps doubled. Formats differ in their
    projections.
    """

    def __init__(self, heads: int, value_heads: int, K: int, V: int, norm_eps: float, neg_eigval: bool):
        super().__init__()
        self.heads, self.value_heads, self.K, self.V = heads, value_heads, K, V
        self.strength = 2.0 if neg_eigval else 1.0
        self.qkv = heads * K, heads * K, value_heads * V
        self.A_log = nn.Parameter(torch.empty(value_heads))
        self.dt_bias = nn.Parameter(torch.empty(value_heads))
        self.o_norm = RMSNorm(V, norm_eps)
        self.conv: ShortConv | None = None
        self._A: Tensor | None = None

    def prepare(self) -> None:
        self._A = -self.A_log.float().exp()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [T, D] -> q, k, v side by side [T, sum(qkv)], a and b [T, Hv], the output's gate [T, Hv * V] or
        None."""
        raise NotImplementedError

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """o [T, Hv, V], normed per head -> [T, D]."""
        raise NotImplementedError

    def leaves(self) -> LayerLeaves:
        S = Leaf((self.value_heads, self.K, self.V))
        return {"S": S} if self.conv is None else {"S": S, "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        qkv, a, b, gate = self.project(x)
        qkv = F.silu(qkv) if self.conv is None else self.conv(qkv, batch, pool_of(state, "conv"))
        qk, v = qkv.split((2 * self.qkv[0], self.qkv[2]), -1)
        q, k = l2norm(qk.unflatten(-1, (-1, self.K))).chunk(2, 1)
        A = -self.A_log.float().exp() if self._A is None else self._A
        o = delta(
            q,
            k,
            v.unflatten(-1, (self.value_heads, self.V)),
            by_row(torch.sigmoid, b.float()) * self.strength,
            A * by_row(F.softplus, a.float() + self.dt_bias.float()),
            pool_of(state, "S"),
            *batch.index,
            scale=self.K**-0.5,
        )
        return self.output(self.o_norm(o), gate)

    def flops(self) -> int:
        return 8 * self.value_heads * self.K * self.V


class GatedDeltaNet(GatedDeltaRule):
    """With a projection of its own for each of q, k, v, a, b and the gate."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        value_heads: int,
        K: int,
        V: int,
        *,
        norm_eps: float,
        conv_size: int | None,
        neg_eigval: bool = False,
        gate: Literal["swish", "silu", "sigmoid"] | None = "swish",
        fused_conv: bool = False,
        activation: str = "silu",
    ):
        """With `fused_conv` the convolutions over q, k and v are one, wherever a checkpoint cuts it; the
        `activation` is theirs."""
        super().__init__(heads, value_heads, K, V, norm_eps, neg_eigval)
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), self.qkv, strict=True))
        parts |= {"a_proj": value_heads, "b_proj": value_heads}
        if gate is not None:
            parts["g_proj"] = value_heads * V
        self.in_proj = Packed(hidden, parts)
        self.gate = torch.sigmoid if gate == "sigmoid" else F.silu
        if conv_size is not None:
            names = ("q_conv1d", "k_conv1d", "v_conv1d")
            convolved = (
                {"+".join(names): sum(self.qkv)} if fused_conv else dict(zip(names, self.qkv, strict=True))
            )
            self.conv = ShortConv(convolved, conv_size, activation=activation)
        self.o_proj = Linear(value_heads * V, hidden, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        qkv, a, b, *gate = self.in_proj(x, (sum(self.qkv), *self.in_proj.sizes[3:]))
        return qkv, a, b, gate[0] if gate else None

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        o = o.flatten(-2)
        return self.o_proj(o if gate is None else o * self.gate(gate))


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)

    def mixer(layer: int) -> GatedDeltaNet:
        return GatedDeltaNet(
            c.hidden_size,
            c.num_heads,
            c.value_heads,
            c.head_dim,
            c.value_dim,
            norm_eps=c.norm_eps,
            conv_size=c.conv_size if c.use_short_conv else None,
            neg_eigval=c.allow_neg_eigval,
            gate=c.output_gate_activation if c.use_gate else None,
        )

    return c, decoder(c, mixer)
