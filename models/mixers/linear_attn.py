"""Linear attention with a choice of feature maps, in flash-linear-attention's checkpoint format."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.outer import outer
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.fla import NAMES, HeadsConfig, decoder
from models.layers import Linear, Packed, RMSNorm
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Config", "LinearAttention", "build"]

DPFP_ROLLS = 4  # not in the published configurations: the feature map's default


class Config(HeadsConfig):
    feature_map: Literal["hedgehog", "t2r", "elementwise_product", "dpfp", "elu", "relu", "identity"] = (
        "elementwise_product"
    )
    tie_feature_map_qk: bool = False
    norm_q: bool = False
    norm_k: bool = False
    norm_feature_map: bool = False
    elementwise_affine: bool = True


class FeatureMap(nn.Module):
    """Of one head's channels [..., K] -> [..., features]."""

    def __init__(self, kind: str, K: int):
        super().__init__()
        self.kind = kind
        self.features = {"hedgehog": 2 * K, "dpfp": 2 * K * DPFP_ROLLS}.get(kind, K)
        if kind in ("hedgehog", "t2r"):
            self.layer = Linear(K, K, bias=kind == "hedgehog")
        elif kind == "elementwise_product":
            self.layers = Packed(K, {"layer1": K, "layer2": K}, bias=True)

    def flops(self, heads: int) -> int:
        """Operations that its projections take for so many heads of a token."""
        return 2 * heads * sum(p.numel() for p in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "hedgehog":  # arXiv 2402.04347
                y = 2 * self.layer(x)
                return torch.cat([y, -y], -1).softmax(-1)
            case "t2r":  # arXiv 2103.13076
                return self.layer(x).relu()
            case "elementwise_product":
                a, b = self.layers(x)
                return a * b
            case "dpfp":  # arXiv 2102.11174, eq. 37
                y = torch.cat([x, -x], -1).relu()
                return torch.cat([y * y.roll(j, -1) for j in range(1, DPFP_ROLLS + 1)], -1)
            case "elu":
                return F.elu(x) + 1
            case "relu":
                return x.relu()
            case "swish":
                return F.silu(x)
        return x


class LinearAttention(Mixer):
    """S = S + phi(k) v^T; o = phi(q)^T S, perhaps over phi(q) . sum phi(k), a column of S that ones fill."""

    def __init__(self, c: Config):
        super().__init__()
        H, Hkv, K, V = c.num_heads, c.kv_heads, c.key_dim, c.value_dim
        self.heads, self.kv_heads, self.K, self.V = H, Hkv, K, V
        self.norm_q, self.norm_k, self.normalise = c.norm_q, c.norm_k, c.norm_feature_map
        self.in_proj = Packed(c.hidden_size, {"q_proj": H * K, "k_proj": Hkv * K, "v_proj": Hkv * V})
        self.feature_map_q = FeatureMap(c.feature_map, K)
        self.feature_map_k = self.feature_map_q if c.tie_feature_map_qk else FeatureMap(c.feature_map, K)
        self.norm = RMSNorm(V, c.norm_eps, c.elementwise_affine)
        self.o_proj = Linear(H * V, c.hidden_size, bias=False)

    def leaves(self) -> LayerLeaves:
        return {"S": Leaf((self.kv_heads, self.feature_map_k.features, self.V + self.normalise))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        q, k, v = self.in_proj(x)
        q = self.feature_map_q(q.unflatten(-1, (self.heads, self.K)))
        k = self.feature_map_k(k.unflatten(-1, (self.kv_heads, self.K)))
        v = v.unflatten(-1, (self.kv_heads, self.V))
        if self.norm_q:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
        if self.norm_k:
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        if self.normalise:
            v = F.pad(v, (0, 1), value=1.0)
        o = outer(q, k, v, None, pool_of(state, "S"), *batch.index, scale=q.shape[-1] ** -0.5)
        if self.normalise:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        return self.o_proj(self.norm(o).flatten(-2))

    def flops(self) -> int:
        features, maps = self.feature_map_k.features, len({self.feature_map_q, self.feature_map_k})
        state = features * (self.V + self.normalise) * (2 * self.kv_heads + 2 * self.heads)
        # Every projection counts once already.
        return state + self.feature_map_k.flops(self.heads + self.kv_heads - maps)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda i: LinearAttention(c))
