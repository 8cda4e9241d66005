"""xLSTM with mLSTM blocks (arXiv 2405.04517, 2503.13427), in transformers' checkpoint format."""

from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from kernels.outer.mlstm import mlstm
from models.batch import Batch
from models.config import Epsilon, Layers, ModelConfig
from models.decoder import Block, Decoder, Mixer
from models.layers import GatedMLP, GroupNorm, Linear, Packed, RMSNorm, softcap
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["MLSTM", "NAMES", "Config", "build"]


class Config(ModelConfig):
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "add_out_norm",  # the norm is there whatever it says
            "autocast_kernel_dtype", "chunk_size", "chunkwise_kernel", "inference_state_dtype",
            "max_inference_chunksize", "mode", "norm_reduction_force_float32", "return_last_states",
            "sequence_kernel", "step_kernel",
        }
    )  # fmt: skip

    hidden_size: int = pydantic.Field(4096, gt=0)
    num_hidden_layers: Layers = 32
    embedding_dim: int | None = None
    num_blocks: Layers | None = None
    num_heads: int = pydantic.Field(8, gt=0)
    use_bias: bool = False
    norm_eps: Epsilon = 1e-6
    qk_dim_factor: float = pydantic.Field(0.5, gt=0)
    v_dim_factor: float = pydantic.Field(1.0, gt=0)
    eps: Epsilon = 1e-6
    ffn_proj_factor: float = pydantic.Field(2.667, gt=0)
    ffn_round_up_to_multiple_of: int = pydantic.Field(64, gt=0)
    gate_soft_cap: float | None = pydantic.Field(15.0, gt=0)
    output_logit_soft_cap: float | None = pydantic.Field(30.0, gt=0)
    weight_mode: Literal["single", "fused"] = "single"
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        if self.embedding_dim not in (None, self.hidden_size):
            raise ValueError(f"embedding_dim = {self.embedding_dim} must be hidden_size = {self.hidden_size}")
        for name, width in (("qk_dim_factor", self.qk_dim), ("v_dim_factor", self.v_dim)):
            if width % self.num_heads:
                raise ValueError(
                    f"hidden_size * {name} = {width} must be a multiple of num_heads = {self.num_heads}"
                )
        return self

    @property
    def qk_dim(self) -> int:
        return int(self.hidden_size * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        return int(self.hidden_size * self.v_dim_factor)

    @property
    def mlp_size(self) -> int:
        unit = self.ffn_round_up_to_multiple_of
        return int((self.hidden_size * self.ffn_proj_factor + unit - 1) // unit * unit)


class MLSTM(Mixer):
    """A matrix memory with exponential gates: C = f C + i k v^T, h = C^T q / max(|n . q|, exp(-m))."""

    def __init__(self, c: Config):
        super().__init__()
        H = c.num_heads
        self.heads, self.K, self.V = H, c.qk_dim // H, c.v_dim // H
        self.cap, self.eps = c.gate_soft_cap, c.eps
        self.sizes = c.qk_dim, c.qk_dim, c.v_dim, c.v_dim, 2 * H
        if c.weight_mode == "single":
            names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
            parts = dict(zip(names, (*self.sizes[:4], H, H), strict=True))
        else:
            parts = {"qkv_opreact": sum(self.sizes[:4]), "ifgate_preact": 2 * H}
        gates = frozenset({"igate_preact", "fgate_preact", "ifgate_preact"}) & parts.keys()
        self.in_proj = Packed(c.hidden_size, parts, bias=True if c.use_bias else gates)
        self.multihead_norm = GroupNorm(H, c.v_dim, c.norm_eps, bias=c.use_bias)
        self.out_proj = Linear(c.v_dim, c.hidden_size, bias=c.use_bias)

    def leaves(self) -> LayerLeaves:
        H, K, V = self.heads, self.K, self.V
        return {"C": Leaf((H, K, V)), "n": Leaf((H, K)), "m": Leaf((H,))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        q, k, v, o, gates = self.in_proj(x, self.sizes)
        i, f = softcap(gates, self.cap).float().chunk(2, -1)
        h = mlstm(
            q.unflatten(-1, (self.heads, self.K)),
            k.unflatten(-1, (self.heads, self.K)),
            v.unflatten(-1, (self.heads, self.V)),
            i,
            f,
            pool_of(state, "C"),
            pool_of(state, "n"),
            pool_of(state, "m"),
            *batch.index,
            scale=self.K**-0.5,
            eps=self.eps,
        )
        return self.out_proj(torch.sigmoid(o) * self.multihead_norm(h))

    def flops(self) -> int:
        return 6 * self.heads * self.K * (self.V + 1)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    D = c.hidden_size
    names = ("proj_up_gate", "proj_up") if c.weight_mode == "single" else ("proj_up_gate_z",)
    blocks = [
        Block(
            RMSNorm(D, c.norm_eps, bias=c.use_bias),
            MLSTM(c),
            RMSNorm(D, c.norm_eps, bias=c.use_bias),
            GatedMLP(D, c.mlp_size, bias=c.use_bias, names=(*names, "proj_down")),
        )
        for _ in range(c.num_blocks or c.num_hidden_layers)
    ]
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    embeddings, norm = nn.Embedding(c.vocab_size, D), RMSNorm(D, c.norm_eps)
    return c, Decoder(embeddings, blocks, norm, head, logit_softcap=c.output_logit_soft_cap)


NAMES = (
    (r"^embeddings\.", "backbone.embeddings."),
    (r"^layers\.", "backbone.blocks."),
    (r"^norm\.", "backbone.out_norm."),
    (r"\.mixer_norm\.", ".norm_mlstm."),
    (r"\.mixer\.", ".mlstm_layer."),
    (r"\.mlp_norm\.", ".norm_ffn."),
    (r"\.mlp\.", ".ffn."),
)
