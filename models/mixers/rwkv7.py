"""RWKV-7 (Goose, arXiv 2503.14456), in flash-linear-attention's checkpoint format."""

from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.delta import dplr
from models.batch import Batch
from models.config import Epsilon
from models.decoder import Block, Decoder, Mixer
from models.fla import ACTIVATIONS, FLAConfig, activation, divided
from models.layers import GroupNorm, Linear, Packed, l2norm, saved_as
from models.mixers.rwkv6 import NAMES
from models.mixers.tokenshift import Shares, TokenShift
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "RWKV7", "Config", "build"]

DECAY = -0.6065306597126334  # -exp(-1/2): no channel forgets faster


class Config(FLAConfig):
    head_dim: int | None = pydantic.Field(64, gt=0)
    num_heads: int | None = pydantic.Field(None, gt=0)
    value_dim: int | list[int] | None = None
    decay_low_rank_dim: int = pydantic.Field(64, gt=0)
    gate_low_rank_dim: int = pydantic.Field(128, gt=0)
    a_low_rank_dim: int = pydantic.Field(64, gt=0)
    v_low_rank_dim: int = pydantic.Field(16, gt=0)
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: Epsilon = 1e-5
    fuse_norm: bool = True
    attn: None = None  # its blocks cannot hold any

    @pydantic.field_validator("hidden_act")
    @classmethod
    def _gated(cls, name: str) -> str:
        activation(name)
        return name

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        if self.head_dim is not None:
            divided(self, "head_dim", self.head_dim)
        elif self.num_heads is None:
            raise ValueError("head_dim or num_heads must be given")
        else:
            divided(self, "num_heads", self.num_heads)
        widths = self.value_dim if isinstance(self.value_dim, list) else [self.values]
        if len(set(widths)) != 1:
            raise ValueError(f"value_dim = {widths}: layers of different width share no first value")
        if self.values % self.heads:
            raise ValueError(f"value_dim = {self.values} must be a multiple of {self.heads} heads")
        return self

    @property
    def heads(self) -> int:
        return self.hidden_size // self.head_dim if self.head_dim else self.num_heads or 1

    @property
    def values(self) -> int:
        """Value channels of all heads."""
        width = self.value_dim[0] if isinstance(self.value_dim, list) else self.value_dim
        return width or self.hidden_size

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-int(self.hidden_size * (self.hidden_ratio or 4)) // 32) * 32


class RWKV7(Mixer):
    """S = diag(exp(w)) S - (kk a) kk^T S + k v^T: direction kk, in-context learning rate a, and values that
    are drawn towards those of the first layer."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        D, H, K, V = c.hidden_size, c.heads, c.hidden_size // c.heads, c.values // c.heads
        self.heads, self.K, self.V = H, K, V
        self.first, self.fused = layer == 0, c.fuse_norm
        self.shift = TokenShift(D)
        self.shares = Shares(("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"), D)
        self.k_k, self.k_a = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
        self.r_k = nn.Parameter(torch.empty(H, K))
        self.r_proj, self.k_proj = Linear(D, D, bias=False), Linear(D, D, bias=False)
        self.v_in = Packed(D, {"v_proj": H * V} | ({} if self.first else {"v_lora.lora.0": c.v_low_rank_dim}))
        if not self.first:
            self.v_up = saved_as("v_lora.lora.2", Linear(c.v_low_rank_dim, H * V))
        self.w_down = saved_as("w_lora.lora.0", Linear(D, c.decay_low_rank_dim, bias=False))
        self.w_up = saved_as("w_lora.lora.2", Linear(c.decay_low_rank_dim, D))
        self.a_down = saved_as("a_lora.lora.0", Linear(D, c.a_low_rank_dim, bias=False))
        self.a_up = saved_as("a_lora.lora.2", Linear(c.a_low_rank_dim, D))
        self.g_down = saved_as("g_lora.lora.0", Linear(D, c.gate_low_rank_dim, bias=False))
        self.g_up = saved_as("g_lora.lora.2", Linear(c.gate_low_rank_dim, H * V, bias=False))
        self.g_norm = GroupNorm(H, H * V, K * c.norm_eps)
        self.o_proj = Linear(H * V, D, bias=False)

    def leaves(self) -> LayerLeaves:
        return {"S": Leaf((self.heads, self.K, self.V)), "shift": self.shift.leaf()}

    def mix(
        self, x: Tensor, v_first: Tensor, batch: Batch, state: LayerState | None
    ) -> tuple[Tensor, Tensor]:
        """x [T, D], the first layer's values [T, H * V] (whatever they are in that layer) -> [T, D], those
        values."""
        delta = self.shift(x, batch, pool_of(state, "shift"))
        xr, xw, xk, xv, xa, xg = self.shares(x, delta)
        r, k = self.r_proj(xr), self.k_proj(xk)
        w = DECAY * torch.sigmoid(self.w_up(torch.tanh(self.w_down(xw))).float())
        a = torch.sigmoid(self.a_up(self.a_down(xa)))
        v, *low = self.v_in(xv)
        if self.first:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v_up(low[0])))
        kk = (k * self.k_k).unflatten(-1, (self.heads, self.K))
        kk = l2norm(kk) if self.fused else F.normalize(kk, dim=-1)
        k = torch.addcmul(k, k * (a - 1), self.k_a)
        r, w, k, a = (y.unflatten(-1, (self.heads, self.K)) for y in (r, w, k, a))
        v = v.unflatten(-1, (self.heads, self.V))
        o = dplr(r, w, k, v, -kk, kk * a, pool_of(state, "S"), *batch.index)
        now = (r * k * self.r_k).sum(-1, keepdim=True)
        o = torch.addcmul(self.g_norm(o).view_as(v), now, v).flatten(-2)
        return self.o_proj(o * self.g_up(torch.sigmoid(self.g_down(xg)))), v_first

    def flops(self) -> int:
        return 9 * self.heads * self.K * self.V


class ChannelMix(Mixer):
    """value(act(key)) of an input that mixes in the token before."""

    def __init__(self, c: Config):
        super().__init__()
        self.shift = TokenShift(c.hidden_size)
        self.x_k = nn.Parameter(torch.empty(c.hidden_size))
        self.key = Linear(c.hidden_size, c.mlp_size, bias=False)
        self.value = Linear(c.mlp_size, c.hidden_size, bias=False)
        self.activation = ACTIVATIONS[c.hidden_act]

    def leaves(self) -> LayerLeaves:
        return {"ffn_shift": self.shift.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        delta = self.shift(x, batch, pool_of(state, "ffn_shift"))
        return self.value(self.activation(self.key(torch.addcmul(x, delta, self.x_k))))

    def flops(self) -> int:
        return 0


class RWKV7Block(Block):
    """Rows [T, D + H * V]: the hidden vector, and behind it the first layer's values."""

    mixer: RWKV7

    def forward(self, rows: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        width = self.mixer.o_proj.out_features
        x, v_first = rows.split((width, rows.shape[1] - width), -1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        y, v_first = self.mixer.mix(self.mixer_norm(x), v_first, batch, state)
        x = x + y
        assert self.mlp_norm is not None and self.mlp is not None
        return torch.cat([x + self.mlp(self.mlp_norm(x), batch, state), v_first], -1)


class RWKV7Decoder(Decoder):
    """A decoder whose rows carry the first layer's values from layer to layer."""

    def __init__(self, *args: Any, values: int):
        super().__init__(*args)
        self.values = values
        self.chains = False  # every layer needs what the first one made

    @property
    def row_width(self) -> int:
        return self.hidden_size + self.values

    def embed(self, ids: Tensor) -> Tensor:
        return F.pad(super().embed(ids), (0, self.values))

    def normed(self, rows: Tensor) -> Tensor:
        return super().normed(rows[:, : self.hidden_size])


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    D = c.hidden_size

    def norm() -> nn.Module:
        return nn.LayerNorm(D, c.norm_eps, bias=c.norm_bias)

    blocks = [
        RWKV7Block(
            norm(), RWKV7(c, i), norm(), ChannelMix(c), pre_norm=norm() if c.norm_first and i == 0 else None
        )
        for i in range(c.num_hidden_layers)
    ]
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    return c, RWKV7Decoder(nn.Embedding(c.vocab_size, D), blocks, norm(), head, values=c.values)
