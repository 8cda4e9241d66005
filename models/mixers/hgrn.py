"""HGRN (arXiv 2311.04823), in flash-linear-attention's checkpoint format."""

from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.diagonal.linear import gated
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.fla import FLAConfig, decoder
from models.layers import Linear, Packed, RMSNorm
from models.mixers.hgrn2 import NAMES
from models.mixers.lowerbounds import LowerBounds
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["HGRN", "NAMES", "Config", "build"]


class Config(FLAConfig):
    expand_ratio: float = pydantic.Field(1, gt=0)
    use_short_conv: bool = False
    conv_size: int = pydantic.Field(4, ge=1, le=16)
    use_lower_bound: bool = True
    elementwise_affine: bool = True

    @property
    def inner(self) -> int:
        return int(self.hidden_size * self.expand_ratio)


class HGRN(Mixer):
    """h = f h + (1 - f) silu(i) with a forget gate f above the layer's lower bound; h normed and gated."""

    def __init__(self, c: Config, layer: int, bounds: LowerBounds | None):
        super().__init__()
        self.inner, self.layer, self.bounds = c.inner, layer, bounds
        self.in_proj = Packed(c.hidden_size, {"i_proj": c.inner, "f_proj": c.inner, "g_proj": c.inner})
        convolved = {"i_conv1d": c.inner, "f_conv1d": c.inner}
        self.conv = ShortConv(convolved, c.conv_size, activation=None) if c.use_short_conv else None
        self.g_norm = RMSNorm(c.inner, c.norm_eps, c.elementwise_affine)
        self.o_proj = Linear(c.inner, c.hidden_size, bias=False)

    def leaves(self) -> LayerLeaves:
        h = Leaf((self.inner,))
        return {"h": h} if self.conv is None else {"h": h, "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        i_f, gate = self.in_proj(x, (2 * self.inner, self.inner))
        if self.conv is not None:
            i_f = self.conv(i_f, batch, pool_of(state, "conv"))
        i, f = i_f.chunk(2, -1)
        log_f = F.logsigmoid(f.float())
        if self.bounds is not None and self.layer > 0:  # the first layer's bound is zero
            log_f = self.bounds.raise_log(log_f, self.layer)
        h = gated(log_f, -F.silu(i) * torch.expm1(log_f), pool_of(state, "h"), *batch.index).to(x.dtype)
        return self.o_proj(self.g_norm(h) * F.silu(gate))

    def flops(self) -> int:
        return 2 * self.inner


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    bounds = LowerBounds(c.num_hidden_layers, c.inner) if c.use_lower_bound else None
    return c, decoder(c, lambda i: HGRN(c, i, bounds))
