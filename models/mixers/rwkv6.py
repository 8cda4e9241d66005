"""RWKV-6 (Finch, arXiv 2404.05892), in flash-linear-attention's checkpoint format."""

from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.invariance import invariant_baddbmm
from kernels.outer import outer
from models.batch import Batch
from models.config import Epsilon
from models.decoder import Block, Decoder, Mixer
from models.fla import ACTIVATIONS, HeadsConfig, activation, hybrid
from models.layers import GroupNorm, Linear, saved_as
from models.mixers.tokenshift import TokenShift
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "RWKV6", "Config", "build"]


class Config(HeadsConfig):
    num_kv_heads: None = None
    expand_k: float = pydantic.Field(0.5, gt=0)
    hidden_ratio: float | None = pydantic.Field(3.5, gt=0)
    hidden_act: str = "sqrelu"
    norm_eps: Epsilon = 1e-5
    proj_low_rank_dim: int = pydantic.Field(32, gt=0)
    gate_low_rank_dim: int = pydantic.Field(64, gt=0)
    norm_first: bool = True
    norm_bias: bool = True

    @pydantic.field_validator("hidden_act")
    @classmethod
    def _gated(cls, name: str) -> str:
        activation(name)
        return name

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-int(self.hidden_size * (self.hidden_ratio or 3.5)) // 32) * 32


class RWKV6(Mixer):
    """o = r^T (S + diag(u) k v^T), then S = diag(exp(-e^w)) S + k v^T; every projection mixes in the token
    before by a share of its own, which depends on the token."""

    def __init__(self, c: Config):
        super().__init__()
        D, H, K, V, R = c.hidden_size, c.num_heads, c.key_dim, c.value_dim, c.proj_low_rank_dim
        self.heads, self.K, self.V = H, K, V
        self.shift = TokenShift(D)
        self.x_down = saved_as("x_proj.0", Lerp(D, 5 * R))
        self.x_up = saved_as("x_proj.2", Shares(R, D))
        self.x_bias = nn.Parameter(torch.empty(5, D))
        self.r_proj = saved_as("r_proj.linear", Linear(D, H * K, bias=False))
        self.k_proj = saved_as("k_proj.linear", Linear(D, H * K, bias=False))
        self.v_proj = saved_as("v_proj.linear", Linear(D, H * V, bias=False))
        self.g_proj = saved_as("g_proj.linear", Linear(D, H * V, bias=False))
        self.w_down = saved_as("w_proj.linear.lora.0", Linear(D, c.gate_low_rank_dim, bias=False))
        self.w_up = saved_as("w_proj.linear.lora.2", Linear(c.gate_low_rank_dim, H * K))
        self.bonus = nn.Parameter(torch.empty(H, K))
        self.g_norm = GroupNorm(H, H * V, c.norm_eps)
        self.o_proj = Linear(H * V, D, bias=False)

    def leaves(self) -> LayerLeaves:
        return {"S": Leaf((self.heads, self.K, self.V)), "shift": self.shift.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        delta = self.shift(x, batch, pool_of(state, "shift"))
        low = torch.tanh(self.x_down(x, delta)).unflatten(-1, (5, -1))  # [T, 5, R]
        r, w, k, v, g = torch.addcmul(x, delta, self.x_up(low, self.x_bias)).unbind(0)
        w = self.w_up(torch.tanh(self.w_down(w)))
        o = outer(
            self.r_proj(r).unflatten(-1, (self.heads, self.K)),
            self.k_proj(k).unflatten(-1, (self.heads, self.K)),
            self.v_proj(v).unflatten(-1, (self.heads, self.V)),
            -w.float().exp().unflatten(-1, (self.heads, self.K)),
            pool_of(state, "S"),
            *batch.index,
            scale=1.0,
            bonus=self.bonus,
        )
        return self.o_proj(self.g_norm(o) * F.silu(self.g_proj(g)))

    def flops(self) -> int:
        return 8 * self.heads * self.K * self.V


class Shares(nn.Module):
    """How much of the token before each of five projections sees: a small projection for each, side by side in one
    weight."""

    def __init__(self, rank: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, 5 * rank))

    def forward(self, low: Tensor, bias: Tensor) -> Tensor:
        """low [T, 5, rank], bias [5, D] -> [5, T, D]."""
        up = self.weight.unflatten(-1, (5, -1))  # [D, 5, rank]
        return invariant_baddbmm(bias[:, None], low.transpose(0, 1), up.permute(1, 2, 0))


class Lerp(nn.Module):
    """A projection of x + delta * mu: between the token and the one before."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.mu = nn.Parameter(torch.empty(inputs))
        self.linear = Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.linear(torch.addcmul(x, delta, self.mu))


class ChannelMix(Mixer):
    """value(act(key)) times a gate, both of which mix in the token before."""

    def __init__(self, c: Config):
        super().__init__()
        self.shift = TokenShift(c.hidden_size)
        self.key = Lerp(c.hidden_size, c.mlp_size)
        self.value = Linear(c.mlp_size, c.hidden_size, bias=False)
        self.receptance = Lerp(c.hidden_size, c.hidden_size)
        self.activation = ACTIVATIONS[c.hidden_act]

    def leaves(self) -> LayerLeaves:
        return {"ffn_shift": self.shift.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        delta = self.shift(x, batch, pool_of(state, "ffn_shift"))
        value = self.value(self.activation(self.key(x, delta)))
        return torch.sigmoid(self.receptance(x, delta)) * value

    def flops(self) -> int:
        return 0


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    D = c.hidden_size

    def norm() -> nn.Module:
        return nn.LayerNorm(D, c.norm_eps, bias=c.norm_bias)

    mixers = hybrid(c, lambda i: RWKV6(c))
    blocks = [
        Block(norm(), mixers(i), norm(), ChannelMix(c), pre_norm=norm() if c.norm_first and i == 0 else None)
        for i in range(c.num_hidden_layers)
    ]
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    return c, Decoder(nn.Embedding(c.vocab_size, D), blocks, norm(), head)


NAMES = (
    (r"^(embeddings|layers|norm)\.", r"model.\1."),
    (r"\.mixer_norm\.", ".attn_norm."),
    (r"\.mlp_norm\.", ".ffn_norm."),
    (r"\.mixer\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
)
