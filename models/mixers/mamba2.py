"""Mamba-2 (arXiv 2405.21060), in the checkpoint formats of transformers and of flash-linear-attention."""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.invariance import by_row
from kernels.outer import outer
from models.batch import Batch
from models.config import Epsilon, ModelConfig
from models.decoder import Block, Decoder, Mixer
from models.layers import GroupRMSNorm, Linear, RMSNorm, activation
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Config", "Mamba2", "build"]

FLA_DEFAULTS = {"n_groups": 1, "bos_token_id": 1}


Limit = Annotated[float, pydantic.Field(allow_inf_nan=True)]


class Config(ModelConfig):
    aliases: ClassVar[dict[str, str]] = {"norm_eps": "layer_norm_epsilon", "dt_limit": "time_step_limit"}
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "A_init_range", "chunk_size", "conv_init", "dt_init_floor", "dt_max", "dt_min",
            "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "rescale_prenorm_residual",
            "time_step_floor", "time_step_max", "time_step_min", "time_step_rank", "use_l2warp",
        }
    )  # fmt: skip

    head_dim: int = pydantic.Field(64, gt=0)
    num_heads: int | None = pydantic.Field(None, gt=0)
    state_size: int = pydantic.Field(128, gt=0)
    n_groups: int = pydantic.Field(8, gt=0)
    expand: float = pydantic.Field(2, gt=0)
    conv_kernel: int = pydantic.Field(4, ge=1, le=16)
    layer_norm_epsilon: Epsilon = 1e-5
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"  # of the convolution; the gate is SiLU always
    residual_in_fp32: bool = True
    time_step_limit: tuple[float, Limit] = (0.0, float("inf"))
    eos_token_id: int | list[int] | None = 2
    bos_token_id: int | None = 0
    # In flash-linear-attention's format only.
    rmsnorm: bool = True
    norm_before_gate: bool = False
    D_has_hdim: bool = False

    _activation = pydantic.field_validator("hidden_act")(activation)

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        inner = round(self.expand * self.hidden_size)
        if inner != self.heads * self.head_dim:
            raise ValueError(
                f"hidden_size * expand = {inner} must be num_heads * head_dim = "
                f"{self.heads} * {self.head_dim}"
            )
        if self.heads % self.n_groups:
            raise ValueError(f"num_heads = {self.heads} must be a multiple of n_groups = {self.n_groups}")
        return self

    @property
    def heads(self) -> int:
        return self.num_heads or round(self.expand * self.hidden_size) // self.head_dim


class FLAConfig(Config):
    hidden_act: Literal["silu", "swish"] = "silu"  # some of its kernels gate with it, others with SiLU


class Mamba2(Mixer):
    """h = exp(dt A) h + dt x B^T, y = h C + D x, per head; B and C are shared by groups of heads.

    A state is kept as [H, N, P]: B is the key, x the value, C the query of an outer-product state.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.P, self.N, self.groups = c.heads, c.head_dim, c.state_size, c.n_groups
        inner, shared = self.heads * self.P, 2 * self.groups * self.N
        self.sizes = inner, inner + shared, self.heads
        self.in_proj = Linear(c.hidden_size, sum(self.sizes), bias=c.use_bias)
        self.conv = ShortConv({"conv1d": inner + shared}, c.conv_kernel, c.use_conv_bias, c.hidden_act)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(inner if c.D_has_hdim else self.heads))
        self.norm = GroupRMSNorm(self.groups, inner, c.layer_norm_epsilon) if c.rmsnorm else None
        self.norm_first = c.norm_before_gate
        self.limits = None if c.time_step_limit == (0.0, float("inf")) else c.time_step_limit
        self.out_proj = Linear(inner, c.hidden_size, bias=c.use_bias)
        self._A: Tensor | None = None

    def prepare(self) -> None:
        self._A = -self.A_log.float().exp()

    def leaves(self) -> LayerLeaves:
        return {"h": Leaf((self.heads, self.N, self.P)), "conv": self.conv.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        z, xBC, dt = self.in_proj(x).split(self.sizes, -1)
        xBC = self.conv(xBC, batch, pool_of(state, "conv"))
        values, BC = xBC.split((self.sizes[0], 2 * self.groups * self.N), -1)
        values = values.unflatten(-1, (self.heads, self.P))
        B, C = BC.unflatten(-1, (2, self.groups, self.N)).unbind(1)
        # The published single step leaves the limits out; whole sequences, and so prefill, keep to them.
        dt = by_row(F.softplus, dt.float() + self.dt_bias.float())
        dt = dt if self.limits is None else dt.clamp(*self.limits)
        A = -self.A_log.float().exp() if self._A is None else self._A
        y = outer(C, B, values * dt.unsqueeze(-1), A * dt, pool_of(state, "h"), *batch.index, scale=1.0)
        y = torch.addcmul(y, values, self.D.view(self.heads, -1)).flatten(-2).to(x.dtype)
        gate = F.silu(z)
        if self.norm is None:
            y = y * gate
        else:
            y = self.norm(y) * gate if self.norm_first else self.norm(y * gate)
        return self.out_proj(y)

    def flops(self) -> int:
        return 6 * self.heads * self.N * self.P


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = FLAConfig.read({**FLA_DEFAULTS, **raw}, file) if "norm_eps" in raw else Config.read(raw, file)
    D, eps = c.hidden_size, c.layer_norm_epsilon
    blocks = [Block(RMSNorm(D, eps), Mamba2(c)) for _ in range(c.num_hidden_layers)]
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    embeddings = nn.Embedding(c.vocab_size, D)
    return c, Decoder(embeddings, blocks, RMSNorm(D, eps), head, residual_in_fp32=c.residual_in_fp32)


NAMES = (
    (r"^embeddings\.", "backbone.embeddings|embedding."),
    (r"^layers\.", "backbone.layers."),
    (r"^norm\.", "backbone.norm_f."),
    (r"\.mixer_norm\.", ".norm."),
)
