"""RWKV-4 (arXiv 2305.13048), in transformers' checkpoint format, `model_type` rwkv."""

from typing import Any, ClassVar

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.diagonal.logsumexp import wkv
from models.batch import Batch
from models.config import Epsilon, ModelConfig
from models.decoder import Block, Decoder, Mixer
from models.layers import Linear, saved_as
from models.mixers.tokenshift import Shares, TokenShift
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "RWKV4", "Config", "build"]

FINAL_NORM_EPS = 1e-5  # layer_norm_epsilon is not handed to the last norm


class Config(ModelConfig):
    aliases: ClassVar[dict[str, str]] = {"context_length": "max_position_embeddings"}

    attention_hidden_size: int | None = pydantic.Field(None, gt=0)
    intermediate_size: int | None = pydantic.Field(None, gt=0)
    layer_norm_epsilon: Epsilon = 1e-5
    rescale_every: int = 6  # 0 and less: never
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0


class RWKV4(Mixer):
    """A weighted average of all values so far, the weights exp(k) fading by w per token; each of k, v and the
    gate r mixes in the token before by a fixed share."""

    def __init__(self, c: Config):
        super().__init__()
        D, inner = c.hidden_size, c.attention_hidden_size or c.hidden_size
        self.inner = inner
        self.shift = TokenShift(D)
        self.shares = Shares(("time_mix_key", "time_mix_value", "time_mix_receptance"), D)
        self.time_decay = nn.Parameter(torch.empty(inner))
        self.time_first = nn.Parameter(torch.empty(inner))
        self.key = Linear(D, inner, bias=False)
        self.value = Linear(D, inner, bias=False)
        self.receptance = Linear(D, inner, bias=False)
        self.output = Linear(inner, D, bias=False)
        self._w: Tensor | None = None

    def prepare(self) -> None:
        self._w = -self.time_decay.float().exp()

    def leaves(self) -> LayerLeaves:
        return {"wkv": Leaf((3, self.inner)), "shift": self.shift.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        k, v, r = self.shares.before(x, self.shift(x, batch, pool_of(state, "shift")))
        w = -self.time_decay.float().exp() if self._w is None else self._w
        u = self.time_first.float()
        average = wkv(self.key(k), self.value(v), w, u, pool_of(state, "wkv"), *batch.index)
        return self.output(torch.sigmoid(self.receptance(r)) * average)

    def flops(self) -> int:
        return 14 * self.inner


class ChannelMix(Mixer):
    """value(relu(key)^2) times a gate, both of which mix in the token before."""

    def __init__(self, c: Config):
        super().__init__()
        D, inner = c.hidden_size, c.intermediate_size or 4 * c.hidden_size
        self.shift = TokenShift(D)
        self.shares = Shares(("time_mix_key", "time_mix_receptance"), D)
        self.key = Linear(D, inner, bias=False)
        self.receptance = Linear(D, D, bias=False)
        self.value = Linear(inner, D, bias=False)

    def leaves(self) -> LayerLeaves:
        return {"ffn_shift": self.shift.leaf()}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        k, r = self.shares.before(x, self.shift(x, batch, pool_of(state, "ffn_shift")))
        return torch.sigmoid(self.receptance(r)) * self.value(F.relu(self.key(k)).square())

    def flops(self) -> int:
        return 0


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    D = c.hidden_size

    def norm(layer: int, eps: float) -> nn.Module:
        # The published code halves the residual after every `rescale_every` layers, and what is added to it,
        # so that float16 holds it. The norms undo that, but for their epsilon.
        halvings = layer // c.rescale_every if c.rescale_every > 0 else 0
        return nn.LayerNorm(D, eps * 4.0**halvings)

    eps, blocks = c.layer_norm_epsilon, []
    for i in range(c.num_hidden_layers):
        first = norm(0, eps) if i == 0 else None
        blocks.append(Block(norm(i, eps), RWKV4(c), norm(i, eps), ChannelMix(c), pre_norm=first))
    head = None if c.tie_word_embeddings else saved_as("head", Linear(D, c.vocab_size, bias=False))
    last = norm(c.num_hidden_layers, FINAL_NORM_EPS)
    return c, Decoder(nn.Embedding(c.vocab_size, D), blocks, last, head)


NAMES = (
    (r"^layers\.", "rwkv.blocks."),
    (r"^norm\.", "rwkv.ln_out."),
    (r"^embeddings\.", "rwkv.embeddings."),
    (r"\.pre_norm\.", ".pre_ln."),
    (r"\.mixer_norm\.", ".ln1."),
    (r"\.mlp_norm\.", ".ln2."),
    (r"\.mixer\.", ".attention."),
    (r"\.mlp\.", ".feed_forward."),
)
