"""Mamba (arXiv 2312.00752), in the checkpoint formats of transformers and of flash-linear-attention."""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonal.selective import (
    MixerWeights,
    Step,
    mixer_half,
    mixer_step,
    selective,
    softplus,
    unweighted_rms_norm,
)
from kernels.pool import Floats, as_float32, tensor_of
from models.batch import Batch
from models.config import Epsilon, ModelConfig
from models.decoder import Block, Decoder, Mixer, Residual
from models.layers import Linear, RMSNorm, activation, matrices, scale_of
from models.mixers.shortconv import ShortConv
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Config", "Mamba", "build", "decoder"]

FLA_DEFAULTS = {"residual_in_fp32": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}


Rank = Annotated[int, pydantic.Field(gt=0)] | Literal["auto"]


class Config(ModelConfig):
    aliases: ClassVar[dict[str, str]] = {"norm_eps": "layer_norm_epsilon", "dt_rank": "time_step_rank"}
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "dt_init_floor", "dt_init_scheme", "dt_max", "dt_min", "dt_scale", "fuse_cross_entropy",
            "fuse_linear_cross_entropy", "fuse_norm", "rescale_prenorm_residual",
            "time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale",
            "use_associative_scan", "use_falcon_mambapy", "use_l2warp", "use_mambapy",
        }
    )  # fmt: skip

    state_size: int = pydantic.Field(16, gt=0)
    expand: float = pydantic.Field(2, gt=0)
    intermediate_size: int | None = pydantic.Field(None, gt=0)  # goes before `expand`
    conv_kernel: int = pydantic.Field(4, ge=1, le=16)
    time_step_rank: Rank = "auto"
    layer_norm_epsilon: Epsilon = 1e-5
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"  # of the convolution; the gate is SiLU always
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    _activation = pydantic.field_validator("hidden_act")(activation)

    @property
    def inner(self) -> int:
        return self.intermediate_size or int(self.expand * self.hidden_size)

    @property
    def rank(self) -> int:
        return -(-self.hidden_size // 16) if self.time_step_rank == "auto" else self.time_step_rank


class FLAConfig(Config):
    hidden_act: Literal["silu", "swish"] = "silu"  # some of its kernels gate with it, others with SiLU


class Mamba(Mixer):
    """h = exp(dt A) h + dt B x, y = (C . h + D x) silu(z), with dt, B and C made from the token; state [N,
    C]."""

    def __init__(self, c: Config, rms_eps: float | None = None):
        """With `rms_eps`, B, C and the low-rank dt are normed without weights (Falcon Mamba)."""
        super().__init__()
        inner, R, N = c.inner, c.rank, c.state_size
        self.inner, self.N, self.sizes, self.rms_eps = inner, N, (R, N, N), rms_eps
        self.in_proj = Linear(c.hidden_size, 2 * inner, bias=c.use_bias)
        self.conv = ShortConv({"conv1d": inner}, c.conv_kernel, c.use_conv_bias, c.hidden_act)
        self.x_proj = Linear(inner, R + 2 * N, bias=False)
        self.dt_proj = Linear(R, inner)
        self.A_log = nn.Parameter(torch.empty(inner, N))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = Linear(inner, c.hidden_size, bias=c.use_bias)
        self._A: Tensor | None = None
        self._step: Step | None = None

    def prepare(self) -> None:
        self._A = -self.A_log.float().exp().t().contiguous()
        found = matrices(self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        if self._A.is_cpu and self.D.dtype is torch.float32 and self.conv.silu and found is not None:
            in_proj, x_proj, dt_proj, out_proj = found
            taps, bias = self.conv.arrays()
            A, skip = self._A.numpy(), as_float32(self.D.detach())
            weights = MixerWeights(in_proj, taps, bias, x_proj, dt_proj, A, skip, out_proj, self.sizes[0])
            self._step = mixer_step(weights, self.rms_eps)

    def leaves(self) -> LayerLeaves:
        return {"h": Leaf((self.N, self.inner)), "conv": self.conv.leaf()}

    def with_norm(self, norm: nn.Module) -> Residual | None:
        normed = scale_of(norm)
        if self._step is None or normed is None:
            return None
        half = mixer_half(self._step, *normed)

        def residual(x: Floats, batch: Batch, state: LayerState) -> Floats:
            if not batch.decodes_few:
                return x + as_float32(self(norm(tensor_of(x)), batch, state))
            return half(x, state["conv"], state["h"], *batch.arrays[:2])

        return residual

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        if self._step is not None and state is not None and batch.decodes_few:
            slots, depths, _ = batch.arrays
            return tensor_of(self._step(as_float32(x), state["conv"], state["h"], slots, depths))
        x, z = self.in_proj(x).chunk(2, -1)
        x = self.conv(x, batch, pool_of(state, "conv"))
        low, B, C = self.x_proj(x).split(self.sizes, -1)
        if self.rms_eps is not None:
            low, B, C = (self._normed(y, self.rms_eps) for y in (low, B, C))
        dt = self._step_size(low)
        A = -self.A_log.float().exp().t() if self._A is None else self._A
        y = selective(x, dt, A, B, C, self.D, z, pool_of(state, "h"), *batch.index)
        return self.out_proj(y)

    def _normed(self, x: Tensor, eps: float) -> Tensor:
        if self._step is not None and not torch.is_grad_enabled():
            return unweighted_rms_norm(x, eps)
        return F.rms_norm(x, x.shape[-1:], eps=eps)

    def _step_size(self, low: Tensor) -> Tensor:
        """Low-rank [T, R] -> softplus(W low + bias) [T, C], float32."""
        if self._step is not None and not torch.is_grad_enabled():
            return softplus(self.dt_proj(low))
        if self.dt_proj._forward_hooks:  # a LoRA by depth adds to what the projection gives
            return F.softplus(self.dt_proj(low).float())
        return F.softplus(F.linear(low, self.dt_proj.weight).float() + self.dt_proj.bias.float())

    def flops(self) -> int:
        return 7 * self.N * self.inner


def decoder(c: Config, rms_eps: float | None = None) -> Decoder:
    D, eps = c.hidden_size, c.layer_norm_epsilon
    blocks = [Block(RMSNorm(D, eps), Mamba(c, rms_eps)) for _ in range(c.num_hidden_layers)]
    head = None if c.tie_word_embeddings else Linear(D, c.vocab_size, bias=False)
    embeddings = nn.Embedding(c.vocab_size, D)
    return Decoder(embeddings, blocks, RMSNorm(D, eps), head, residual_in_fp32=c.residual_in_fp32)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = FLAConfig.read({**FLA_DEFAULTS, **raw}, file) if "norm_eps" in raw else Config.read(raw, file)
    return c, decoder(c)


NAMES = (
    (r"^embeddings\.", "backbone.embeddings|embedding."),
    (r"^layers\.", "backbone.layers."),
    (r"^norm\.", "backbone.norm_f."),
    (r"\.mixer_norm\.", ".norm."),
)
