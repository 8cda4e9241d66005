"""Retention (RetNet, arXiv 2307.08621), in flash-linear-attention's checkpoint format."""

from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.outer import outer
from models.batch import Batch
from models.config import one_of
from models.decoder import Decoder, Mixer
from models.fla import NAMES, HeadsConfig, decoder
from models.layers import ACTIVATIONS, Linear, Packed, RMSNorm, Rotary, saved_as
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Config", "Retention", "build"]


class Config(HeadsConfig):
    inert = frozenset({"conv_size", "use_short_conv"})  # its blocks have no convolution, whatever these say

    num_heads: int = pydantic.Field(8, gt=0)
    expand_v: float = pydantic.Field(2.0, gt=0)
    hidden_ratio: float | None = pydantic.Field(2, gt=0)
    feature_map: str | None = None
    use_output_gate: bool = True
    elementwise_affine: bool = True
    fuse_norm: bool = True

    @pydantic.field_validator("feature_map")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return name and one_of(name, ACTIVATIONS)  # not that library's own table, as in its other layers

    @pydantic.model_validator(mode="after")
    def _rotary(self) -> "Config":
        if self.key_dim % 2:
            raise ValueError(f"heads of {self.key_dim} key channels: must be even, for rotary positions")
        return self


class Retention(Mixer):
    """S = gamma_h S + k v^T with gamma_h = 1 - 2^(-5 - h); o = K^-1/2 q^T S, normed per head and gated."""

    def __init__(self, c: Config):
        super().__init__()
        H, Hkv, K, V = c.num_heads, c.kv_heads, c.key_dim, c.value_dim
        self.heads, self.kv_heads, self.K, self.V = H, Hkv, K, V
        self.feature_map = ACTIVATIONS[c.feature_map] if c.feature_map else None
        parts = {"q_proj": H * K, "k_proj": Hkv * K, "v_proj": Hkv * V}
        if c.use_output_gate:
            parts["g_proj"] = H * V
        self.in_proj = Packed(c.hidden_size, parts)
        self.sizes = [(H + Hkv) * K, *self.in_proj.sizes[2:]]
        self.rotary = Rotary(K)
        self.g_norm = RMSNorm(V, c.norm_eps, c.elementwise_affine)
        if c.fuse_norm and c.use_output_gate and c.hidden_act == "swish":
            saved_as("g_norm_swish_gate", self.g_norm)
        self.o_proj = Linear(H * V, c.hidden_size, bias=False)
        self.decay: Tensor | None = None

    def leaves(self) -> LayerLeaves:
        return {"S": Leaf((self.heads, self.K, self.V))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        qk, v, *gate = self.in_proj(x, self.sizes)
        qk = qk.unflatten(-1, (-1, self.K))
        qk = self.rotary(qk if self.feature_map is None else self.feature_map(qk), batch.positions)
        o = outer(
            qk[:, : self.heads],
            qk[:, self.heads :],
            v.unflatten(-1, (self.kv_heads, self.V)),
            self._log_decay(x.device).expand(x.shape[0], -1),
            pool_of(state, "S"),
            *batch.index,
            scale=self.K**-0.5,
        )
        o = self.g_norm(o).flatten(-2)
        return self.o_proj(o * F.silu(gate[0]) if gate else o)

    def _log_decay(self, device: torch.device) -> Tensor:
        """[H], static."""
        if self.decay is None or self.decay.device != device:
            self.decay = (1 - 2.0 ** (-5.0 - torch.arange(self.heads, device=device))).log()
        return self.decay

    def flops(self) -> int:
        return 6 * self.K * self.V * self.heads


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda i: Retention(c))
