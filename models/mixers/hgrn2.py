"""HGRN2 (arXiv 2404.07904), in flash-linear-attention's checkpoint format."""

from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.outer import outer
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.fla import NAMES as FLA_NAMES
from models.fla import FLAConfig, decoder, divided
from models.layers import Linear, Packed, RMSNorm
from models.mixers.lowerbounds import LowerBounds
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["HGRN2", "NAMES", "Config", "build"]

NORM_EPS = 1e-5  # of the norm before the output projection: the published code does not hand norm_eps to it


class Config(FLAConfig):
    num_heads: int | None = pydantic.Field(None, gt=0)
    expand_ratio: int | None = pydantic.Field(128, gt=0)
    use_short_conv: bool = False
    conv_size: int = pydantic.Field(4, ge=1, le=16)
    use_lower_bound: bool = True
    elementwise_affine: bool = True

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        if self.expand_ratio is not None:
            divided(self, "expand_ratio", self.expand_ratio)
        elif self.num_heads is None:
            raise ValueError("expand_ratio or num_heads must be given")
        else:
            divided(self, "num_heads", self.num_heads)
        return self

    @property
    def heads(self) -> int:
        """The expansion ratio, where there is one, decides."""
        return self.hidden_size // self.expand_ratio if self.expand_ratio else self.num_heads or 1


class HGRN2(Mixer):
    """S = diag(f) S + (1 - f) i^T with a forget gate f above the layer's lower bound; o = q^T S."""

    def __init__(self, c: Config, layer: int, bounds: LowerBounds | None):
        super().__init__()
        D = c.hidden_size
        self.heads, self.K = c.heads, D // c.heads
        self.layer, self.bounds = layer, bounds
        self.in_proj = Packed(D, {"q_proj": D, "f_proj": D, "i_proj": D})
        convolved = {"q_conv1d": D, "f_conv1d": D, "i_conv1d": D}
        self.conv = ShortConv(convolved, c.conv_size, activation=None) if c.use_short_conv else None
        self.g_norm = RMSNorm(D, NORM_EPS, c.elementwise_affine)
        self.o_proj = Linear(D, D, bias=False)

    def leaves(self) -> LayerLeaves:
        S = Leaf((self.heads, self.K, self.K))
        return {"S": S} if self.conv is None else {"S": S, "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        (qfi,) = self.in_proj(x, (3 * self.heads * self.K,))
        if self.conv is not None:
            qfi = self.conv(qfi, batch, pool_of(state, "conv"))
        q, f, i = qfi.unflatten(-1, (3, self.heads, self.K)).unbind(1)
        g = F.logsigmoid(f.float())
        if self.bounds is not None and self.layer > 0:  # the first layer's bound is zero
            g = self.bounds.raise_log(g.flatten(-2), self.layer).view_as(g)
        k = -torch.expm1(g)
        o = outer(F.silu(q), k, i, g, pool_of(state, "S"), *batch.index, scale=self.K**-0.5)
        return self.o_proj(self.g_norm(o.flatten(-2)))

    def flops(self) -> int:
        return 6 * self.heads * self.K * self.K


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    bounds = LowerBounds(c.num_hidden_layers, c.hidden_size) if c.use_lower_bound else None
    return c, decoder(c, lambda i: HGRN2(c, i, bounds))


NAMES = ((r"^layers\.\d+\.mixer\.bounds\.", "model."), *FLA_NAMES)
