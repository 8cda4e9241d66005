"""Huginn (arXiv 2502.05171), in the published checkpoint format: a prelude makes an embedding e of the token, the core
is looped over an adapter of (x, e) from a random x, and the coda reads the result."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from models.batch import Batch
from models.config import ModelConfig
from models.decoder import Block, Decoder
from models.depth.looped import Loop, LoopedDecoder, Skipped
from models.depth.noise import truncated_normal
from models.layers import GatedMLP, Linear, Packed, RMSNorm, Rotary
from models.mixers.attention import Attention
from models.state import LayerState


class InitValues(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="ignore")

    std: float | None = pydantic.Field(None, ge=0)
    embed_scale: float | None = None


class Config(ModelConfig):
    aliases: ClassVar[dict[str, str]] = {
        "n_embd": "hidden_size",
        "n_layers": "num_hidden_layers",
        "tie_embeddings": "tie_word_embeddings",
        "block_size": "max_position_embeddings",
    }

    num_attention_heads: int = pydantic.Field(gt=0)
    num_key_value_heads: int | None = pydantic.Field(None, gt=0)
    intermediate_size: int = pydantic.Field(gt=0)
    n_layers_in_prelude: int = pydantic.Field(2, gt=0)
    n_layers_in_recurrent_block: int = pydantic.Field(4, gt=0)
    n_layers_in_coda: int = pydantic.Field(2, gt=0)
    mean_recurrence: int = pydantic.Field(32, gt=0, le=1024)
    padded_vocab_size: int | None = pydantic.Field(None, gt=0)
    padding_multiple: int = pydantic.Field(4096, gt=0)
    init_scale: float = pydantic.Field(1.0, ge=0)  # of the random start; 0: zeros
    init_values: InitValues = InitValues()
    rope_base: float = pydantic.Field(50_000, gt=0)
    norm_eps: float = 1e-6
    qk_bias: bool = True
    bias: bool = False  # of the adapter
    tie_word_embeddings: bool = True
    injection_type: Literal["linear"] = "linear"
    test_time_noise: Literal[0] = 0
    skipped: Skipped = "last_exited"  # ours: how the published cache looks up what is missing ("latest-m4")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.kv_heads:
            heads = f"num_attention_heads = {self.num_attention_heads}"
            raise ValueError(f"{heads} must divide n_embd and be a multiple of num_key_value_heads")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rows_of_embedding(self) -> int:
        return self.padded_vocab_size or -(-self.vocab_size // self.padding_multiple) * self.padding_multiple

    @property
    def embed_scale(self) -> float:
        return self.init_values.embed_scale or math.sqrt(self.hidden_size)

    @property
    def start_scale(self) -> float:
        """Standard deviation of the random start."""
        std = math.sqrt(2 / (5 * self.hidden_size)) if self.init_values.std is None else self.init_values.std
        return self.init_scale * std * self.embed_scale


class BiasedAttention(Attention):
    """Queries and keys have a bias for each head, [2, 1, heads, head_dim] in the checkpoint."""

    def __init__(self, c: Config):
        head_dim = c.hidden_size // c.num_attention_heads
        rotary = Rotary(head_dim, c.rope_base, interleaved=True)
        super().__init__(c.hidden_size, c.num_attention_heads, c.kv_heads, head_dim, rotary=rotary)
        size = sum(self.qkv.sizes)
        self.qkv = Packed(c.hidden_size, {"Wqkv": size})
        self.sizes = (self.heads * head_dim, self.kv_heads * head_dim, self.kv_heads * head_dim)
        self.qk_bias = nn.Parameter(torch.empty(2, 1, c.num_attention_heads, head_dim)) if c.qk_bias else None

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x, self.sizes))
        if self.qk_bias is not None:
            q, k = q + self.qk_bias[0], k + self.qk_bias[1]
        assert self.rotary is not None
        return self.rotary(q, positions), self.rotary(k, positions), v


class SandwichBlock(Block):
    """x = norm_2(attn(norm_1(x)) + x); x = norm_4(mlp(norm_3(x)) + x)."""

    def __init__(self, c: Config):
        def norm() -> RMSNorm:
            return RMSNorm(c.hidden_size, c.norm_eps)

        mlp = GatedMLP(c.hidden_size, c.intermediate_size, names=("fc", "proj"))
        super().__init__(norm(), BiasedAttention(c), norm(), mlp)
        self.norm_2, self.norm_4 = norm(), norm()

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        assert self.mlp is not None and self.mlp_norm is not None
        x = self.norm_2(self.mixer(self.mixer_norm(x), batch, state) + x)
        return self.norm_4(self.mlp(self.mlp_norm(x)) + x)


class Huginn(LoopedDecoder):
    """A row carries x and e."""

    def __init__(self, c: Config):
        layers = c.n_layers_in_prelude + c.n_layers_in_recurrent_block + c.n_layers_in_coda
        super().__init__(
            nn.Embedding(c.rows_of_embedding, c.hidden_size),
            [SandwichBlock(c) for _ in range(layers)],
            RMSNorm(c.hidden_size, c.norm_eps),
            None if c.tie_word_embeddings else Linear(c.hidden_size, c.rows_of_embedding, bias=False),
            Loop(c.mean_recurrence, c.n_layers_in_prelude, c.n_layers_in_coda, c.skipped),
            embedding_scale=c.embed_scale,
        )
        self.adapter = Linear(2 * c.hidden_size, c.hidden_size, bias=c.bias)
        self.start_scale = c.start_scale
        self.draws = c.start_scale > 0
        # What a token would predict goes through the coda, which attends to the tokens before: they must be done.
        self.predicts_through = self.cores.stop

    @property
    def rest(self) -> int:
        return self.hidden_size

    def begin(self, x: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        if self.start_scale == 0 or batch is None or batch.seeds is None:
            return torch.zeros_like(x), x
        seeds = batch.seeds
        if batch.segments != len(x):
            seeds = seeds.repeat_interleave(batch.offsets.diff())
        return (truncated_normal(seeds, batch.positions, x.shape[1]) * self.start_scale).to(x.dtype), x

    def enter(self, rows: Tensor, batch: Batch) -> Tensor:
        return self.adapter(torch.cat([self.hidden(rows), self.beside(rows)], -1))

    def end(self, rows: Tensor) -> Tensor:
        return self.norm(self.hidden(rows))

    def intermediate(
        self, rows: Tensor, index: Tensor, batch: Batch, states: Sequence[LayerState] | None
    ) -> Tensor:
        """As the coda would give them now; its entries of these tokens, one of a sequence, are taken back."""
        assert self.predicts_through is not None and states is not None
        probe, rows = batch.alone(index).at_depth(0), rows.index_select(0, index)
        x = self.end(rows)
        for i in self.stages[self.predicts_through].layers:
            x = self.layers[i](x, probe, states[i])
            states[i]["count"][probe.slots, 0] -= 1
        return self.normed(x)


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, Huginn(c)


def names(raw: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Layers are numbered through here, and within prelude, core and coda there."""
    c = Config.read(raw, "config.json")
    parts = {
        "prelude": c.n_layers_in_prelude,
        "core_block": c.n_layers_in_recurrent_block,
        "coda": c.n_layers_in_coda,
    }
    numbered, at = [], 0
    for part, count in parts.items():
        numbered += [(rf"^layers\.{at + i}\.", f"transformer.{part}.{i}.") for i in range(count)]
        at += count
    return (*numbered, *NAMES)


NAMES = (
    (r"^embeddings\.", "transformer.wte."),
    (r"^norm\.", "transformer.ln_f."),
    (r"^adapter\.", "transformer.adapter."),
    (r"\.mixer_norm\.", ".norm_1."),
    (r"\.mlp_norm\.", ".norm_3."),
    (r"\.mixer\.o_proj\.", ".attn.proj."),
    (r"\.mixer\.", ".attn."),
)
