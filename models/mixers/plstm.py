"""pLSTM on a sequence (arXiv 2506.11997): source, transition, mark and direct gates, one number each per
head."""

from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from kernels.outer.plstm import plstm
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GenericConfig, decoder
from models.layers import GroupNorm, Linear, Packed
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "PLSTM", "Config", "build"]

GATES = ("source", "transition", "mark", "direct")


class Config(GenericConfig):
    num_heads: int = pydantic.Field(4, gt=0)
    qk_dim: int | None = pydantic.Field(None, gt=0)  # of all heads; default hidden_size
    transition: Literal["sigmoid", "tanh"] = "sigmoid"  # tanh: negative eigenvalues, for state tracking

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        self.heads_of("hidden_size", self.hidden_size, self.num_heads)
        self.heads_of("qk_dim", self.keys, self.num_heads)
        return self

    @property
    def keys(self) -> int:
        return self.qk_dim or self.hidden_size


class PLSTM(Mixer):
    """C = T C + S k v^T, y = K^-1/2 q^T (M C_before + D k v^T), the gates S, T, M, D made from the token."""

    def __init__(self, c: Config):
        super().__init__()
        H, D = c.num_heads, c.hidden_size
        self.heads, self.K, self.V = H, c.keys // H, D // H
        self.sizes = c.keys, c.keys, D, 4 * H
        parts = {"q_proj": c.keys, "k_proj": c.keys, "v_proj": D} | {f"{gate}_net": H for gate in GATES}
        self.in_proj = Packed(D, parts, bias=frozenset(f"{gate}_net" for gate in GATES))
        self.signed = c.transition == "tanh"
        self.multihead_norm = GroupNorm(H, D, c.norm_eps, bias=False)
        self.out_proj = Linear(D, D, bias=False)

    def leaves(self) -> LayerLeaves:
        return {"C": Leaf((self.heads, 1, self.K, self.V))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        q, k, v, gates = self.in_proj(x, self.sizes)
        q, k, v = (y.unflatten(-1, (self.heads, 1, -1)) for y in (q, k, v))
        source, transition, mark, direct = gates.float().unflatten(-1, (4, self.heads, 1, 1)).unbind(1)
        transition = torch.tanh(transition) if self.signed else torch.sigmoid(transition)
        source, mark, direct = (torch.sigmoid(gate).unsqueeze(-1) for gate in (source, mark, direct))
        y = plstm(
            q, k, v, source, transition, mark, direct.unsqueeze(-1), pool_of(state, "C"), *batch.index,
            scale=self.K**-0.5,
        )  # fmt: skip
        return self.out_proj(self.multihead_norm(y.to(x.dtype)))

    def flops(self) -> int:
        return 6 * self.heads * self.K * self.V


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: PLSTM(c))
