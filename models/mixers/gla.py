"""Gated Linear Attention (arXiv 2312.06635), in flash-linear-attention's checkpoint format."""

from typing import Any, Literal, cast

import numpy as np
import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.outer import outer
from kernels.outer.gla import GLAWeights, gla_mixer, gla_step
from kernels.pool import Floats, inference
from models.batch import Batch
from models.decoder import Decoder, Mixer, Residual
from models.fla import ACTIVATIONS, NAMES, HeadsConfig, activation, decoder
from models.layers import Linear, Packed, RMSNorm, matrices, saved_as, scale_of
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["GLA", "NAMES", "Config", "build"]

GATE_LOGIT_NORMALIZER = 16  # not in the published configurations: the layer's default
GATE_LOW_RANK_DIM = 16


class Config(HeadsConfig):
    expand_k: float = pydantic.Field(0.5, gt=0)
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = pydantic.Field(4, ge=1, le=16)
    use_output_gate: bool = True
    clamp_min: float | None = None
    elementwise_affine: bool = True
    fuse_norm: bool = True
    use_gk: Literal[True] = True
    use_gv: Literal[False] = False

    _feature_map = pydantic.field_validator("feature_map")(activation)


class GLA(Mixer):
    """S = diag(exp(gk)) S + k v^T; o = K^-1/2 q^T S, normed per head and gated."""

    def __init__(self, c: Config):
        super().__init__()
        H, Hkv, K, V = c.num_heads, c.kv_heads, c.key_dim, c.value_dim
        self.heads, self.kv_heads, self.K, self.V = H, Hkv, K, V
        self.clamp_min = c.clamp_min
        self.feature_map = ACTIVATIONS[c.feature_map] if c.feature_map else None
        self.qkv = H * K, Hkv * K, Hkv * V
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), self.qkv, strict=True))
        parts["gk_proj.0"] = GATE_LOW_RANK_DIM
        if c.use_output_gate:
            parts["g_proj"] = H * V
        self.in_proj = Packed(c.hidden_size, parts)
        self.gk_proj = nn.ModuleDict({"1": Linear(GATE_LOW_RANK_DIM, Hkv * K)})
        convolved = dict(zip(("q_conv1d", "k_conv1d", "v_conv1d"), self.qkv, strict=True))
        self.conv = ShortConv(convolved, c.conv_size) if c.use_short_conv else None
        self.gated = c.use_output_gate
        self.g_norm = RMSNorm(V, c.norm_eps, c.elementwise_affine)
        if c.fuse_norm and c.use_output_gate and c.hidden_act == "swish":
            saved_as("g_norm_swish_gate", self.g_norm)
        self.o_proj = Linear(H * V, c.hidden_size, bias=False)
        self._plain = Hkv == H and self.clamp_min is None and self.feature_map is None

    def leaves(self) -> LayerLeaves:
        S = Leaf((self.kv_heads, self.K, self.V))
        return {"S": S} if self.conv is None else {"S": S, "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        if state is not None and self.g_norm.array is not None and self._plain and inference(x):
            return self._in_one_call(x, batch, state, self.g_norm.array)
        qkv, low, *gate = self.in_proj(x, (sum(self.qkv), *self.in_proj.sizes[3:]))
        if self.conv is not None:
            qkv = self.conv(qkv, batch, pool_of(state, "conv"))
        q, k, v = qkv.split(self.qkv, -1)
        gk = F.logsigmoid(self.gk_proj["1"](low).float()) / GATE_LOGIT_NORMALIZER
        if self.clamp_min is not None:
            gk = gk.clamp_min(self.clamp_min)
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        o = outer(
            q.unflatten(-1, (self.heads, self.K)),
            k.unflatten(-1, (self.kv_heads, self.K)),
            v.unflatten(-1, (self.kv_heads, self.V)),
            gk.unflatten(-1, (self.kv_heads, self.K)),
            pool_of(state, "S"),
            *batch.index,
            scale=self.K**-0.5,
        )
        o = self.g_norm(o).flatten(-2)
        if self.gated:
            o = o * F.silu(gate[0])
        return self.o_proj(o)

    def _in_one_call(self, x: Tensor, batch: Batch, state: LayerState, weight: Floats) -> Tensor:
        """The same on a CPU."""
        (made,) = self.in_proj(x, (sum(self.in_proj.sizes),))
        first, gate = sum(self.qkv), sum(self.qkv) + GATE_LOW_RANK_DIM
        qkv = made if self.conv is None else self.conv(made[:, :first], batch, pool_of(state, "conv"))
        o = gla_step(
            qkv,
            self.gk_proj["1"](made[:, first:gate]),
            made,
            gate if self.gated else -1,
            weight,
            state["S"],
            *batch.index,
            normalizer=GATE_LOGIT_NORMALIZER,
            scale=self.K**-0.5,
            eps=self.g_norm.eps,
        )
        return self.o_proj(o)

    def with_norm(self, norm: nn.Module) -> Residual | None:
        found = matrices(self.in_proj, cast("Linear", self.gk_proj["1"]), self.o_proj)
        normed, normed_heads = scale_of(norm), scale_of(self.g_norm)
        if (
            found is None
            or normed is None
            or normed_heads is None
            or not self._plain
            or self.conv is not None
        ):
            return None
        in_proj, decay, out_proj = found
        f32 = np.float32
        weights = GLAWeights(
            *normed, in_proj, decay, *normed_heads, out_proj,
            self.heads, self.qkv[1], GATE_LOW_RANK_DIM, self.gated, f32(GATE_LOGIT_NORMALIZER), f32(self.K**-0.5),
        )  # fmt: skip
        mixer = gla_mixer(weights)
        return lambda x, batch, state: mixer(x, state["S"], *batch.arrays)

    def flops(self) -> int:
        return self.K * self.V * (4 * self.kv_heads + 2 * self.heads)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda i: GLA(c))
