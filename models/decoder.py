"""A decoder-only language model as the engine sees it: stages, rows, states, logits.

A *stage* is a run of layers with one set of weights for every token passing through. A *row* is the vector that a
token carries between stages, [row_width]: its hidden vector, and whatever else the next stage needs of it. A plain
stack is one stage; looped, nested and chained models have several (models.depth).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.layers import Linear
from models.paths import Node, Path
from models.state import LayerLeaves, LayerState, Layout


class Mixer(Protocol):
    """What mixes tokens along a sequence: projections around one kernel."""

    def leaves(self) -> LayerLeaves:
        """The state that one sequence keeps."""

    def __call__(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        """Packed x [T, D] -> [T, D]; the state is advanced in place. Without a state: from zero, differentiable."""

    def flops(self) -> int:
        """Floating-point operations of one token beside those of the projections."""


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); either half may be absent."""

    def __init__(
        self,
        mixer_norm: nn.Module,
        mixer: nn.Module,
        mlp_norm: nn.Module | None = None,
        mlp: nn.Module | None = None,
    ):
        super().__init__()
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), batch, state)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    layers: range
    head: bool = False  # ends with the final norm and the head


class Decoder(nn.Module):
    """Embedding, a stack of layers in one stage, a final norm and a head."""

    def __init__(
        self,
        embeddings: nn.Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        lm_head: Linear | None,
    ):
        """Without an `lm_head` of its own the model is tied: the embedding serves as one."""
        super().__init__()
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.lm_head = lm_head
        self.stages: tuple[Stage, ...] = (Stage("stack", range(len(layers)), head=True),)
        self.default_depth = "full"  # policy of a request that does not give one
        self.signals: frozenset[str] = frozenset()  # exit signals of its own: router, gate

    @property
    def vocab_size(self) -> int:
        return self.embeddings.num_embeddings

    @property
    def row_width(self) -> int:
        return self.embeddings.embedding_dim

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    def layout(self) -> Layout:
        return Layout.of([layer.mixer.leaves() for layer in self.layers])

    def path(self) -> Path:
        """The way of a token that goes the whole depth, with the exits that it passes."""
        return Path((Node(0, units=1),))

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] -> rows [T, row_width]."""
        return self.embeddings(ids)

    def run(self, stage: int, rows: Tensor, batch: Batch, states: Sequence[LayerState] | None) -> Tensor:
        """Rows [T, row_width] through one stage; states are advanced in place."""
        for i in self.stages[stage].layers:
            rows = self.layers[i](rows, batch, None if states is None else states[i])
        return rows

    def logits(self, rows: Tensor) -> Tensor:
        """Rows [R, row_width] that have passed the last stage -> [R, vocab_size], float32."""
        x = self.norm(rows)
        head = self.embeddings.weight if self.lm_head is None else self.lm_head.weight
        return torch.nn.functional.linear(x, head).float()

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """Every stage once, from an empty state: packed ids [T] -> logits [T, vocab_size]. For training."""
        rows = self.embed(ids)
        for stage in range(len(self.stages)):
            rows = self.run(stage, rows, batch, None)
        return self.logits(rows)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, units: float | None = None) -> float:
        """Of a token that goes so deep, or the whole depth. Multiply-adds count as two; the embedding lookup is free."""
        head = self.vocab_size * self.row_width
        weights = sum(p.numel() for p in self.layers.parameters()) + head
        return 2 * weights + sum(layer.mixer.flops() for layer in self.layers)
