"""Looped models: a prelude, a core that a token passes as often as it needs, and a coda.

Recursive transformers (arXiv 2410.20672), and the same over any other mixer: a looped GLA keeps constant memory and
adapts its depth. Every pass through the core has a state of its own, unless the model shares it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.decoder import Decoder, Stage
from models.layers import Linear
from models.paths import NOWHERE, Node, Path
from models.state import LayerLayout, LayerState, Layout

Skipped = Literal["absent", "shared", "last_exited", "propagate"]
"""What later tokens see of a token at the depths that it skipped: nothing (recursion-wise caching); the one state that
all depths read, written at the first; what it wrote at the last depth that it reached; what it would have written had
it kept the hidden vector with which it left."""


class LoopedDecoder(Decoder):
    """`prelude` + core + `coda` layers; the core runs up to `depths` times.

    A row is the hidden vector x, then the columns `rest` that a kind of looped model carries beside it, then, where
    skipped depths are `last_exited`, what each layer of the core was last given.
    """

    rest = 0  # columns beside the hidden vector

    def __init__(
        self,
        embeddings: nn.Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        lm_head: Linear | None,
        *,
        prelude: int,
        coda: int,
        depths: int,
        skipped: Skipped = "absent",
        **options: Any,
    ):
        super().__init__(embeddings, layers, norm, lm_head, **options)
        self.depths = depths
        self.skipped: Skipped = skipped
        self.fills = skipped in ("last_exited", "propagate")
        end = len(layers) - coda
        stages = [Stage("prelude", range(prelude))] if prelude else []
        self.core = len(stages)
        self.stages = (*stages, Stage("core", range(prelude, end)), Stage("coda", range(end, len(layers)), head=True))

    # What kinds of looped models differ in.

    def begin(self, x: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """Before the first pass: x [T, D] as the prelude left it -> x, rest [T, rest]. Without a prelude there is no
        batch yet."""
        return x, x.new_zeros(len(x), self.rest)

    def enter(self, x: Tensor, rest: Tensor, batch: Batch) -> Tensor:
        """What a pass begins with."""
        return x

    def leave(self, before: Tensor, x: Tensor, rest: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """After a pass that had begun with the rows `before` [T, D]: x, rest."""
        return x, rest

    def end(self, x: Tensor, rest: Tensor) -> Tensor:
        """What the coda begins with."""
        return x

    def skips_core(self) -> bool:
        """Whether a token may leave before its first pass."""
        return False

    # What they have in common.

    @property
    def row_width(self) -> int:
        kept = len(self.stages[self.core].layers) if self.skipped == "last_exited" else 0
        return self.hidden_size * (1 + kept) + self.rest

    def path(self) -> Path:
        coda = self.core + self.depths
        early = coda if self.skips_core() else NOWHERE
        prelude = [Node(stage, exit_to=early) for stage in range(self.core)]
        core = [Node(self.core, depth, units=depth + 1, exit_to=coda) for depth in range(self.depths)]
        return Path((*prelude, *core, Node(self.core + 1)))

    def layout(self) -> Layout:
        core, shared = self.stages[self.core].layers, self.skipped == "shared"
        return Layout(
            tuple(
                LayerLayout(block.leaves(), self.depths, shared, group=1) if i in core else LayerLayout(block.leaves())
                for i, block in enumerate(self.blocks)
            )
        )

    def appends(self, stage: int, depths: Tensor) -> dict[int, Tensor]:
        appended = super().appends(stage, depths)
        if self.skipped == "shared" and stage == self.core:
            return {group: torch.where(at > 0, -1, at) for group, at in appended.items()}
        return appended

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return self._row(*self.begin(x, None)) if self.core == 0 else self._row(x, x.new_zeros(len(x), self.rest))

    def run(self, stage: int, rows: Tensor, batch: Batch, states: Sequence[LayerState] | None) -> Tensor:
        """As every decoder; the last stage returns the hidden vectors alone."""
        x, rest = rows[:, : self.hidden_size], rows[:, self.hidden_size : self.hidden_size + self.rest]
        if stage == self.core:
            return self._pass(rows, x, rest, batch, states)
        if stage < self.core:
            return self._row(*self.begin(super().run(stage, x, batch, states), batch))
        return super().run(stage, self.end(x, rest), batch, states)

    def _pass(
        self, rows: Tensor, x: Tensor, rest: Tensor, batch: Batch, states: Sequence[LayerState] | None
    ) -> Tensor:
        """One pass through the core. Ghosts give each layer what they gave it last, or their hidden vector."""
        ghosts = None if batch.ghosts is None else batch.ghosts[:, None]
        last_exited = self.skipped == "last_exited"
        kept = rows[:, self.hidden_size + self.rest :].unflatten(-1, (-1, self.hidden_size)) if last_exited else None
        y, given = self.enter(x, rest, batch), []
        for j, i in enumerate(self.stages[self.core].layers):
            if ghosts is not None:
                y = torch.where(ghosts, x if kept is None else kept[:, j], y)
            given.append(y)
            y = self.layers[i](y, batch, None if states is None else states[i])
        after = self._row(*self.leave(x, y, rest, batch), *(given if last_exited else ()))
        return after if ghosts is None else torch.where(ghosts, rows, after)

    def _row(self, x: Tensor, rest: Tensor, *kept: Tensor) -> Tensor:
        if self.row_width == self.hidden_size:
            return x
        parts = [x, rest, *kept]
        missing = self.row_width - sum(part.shape[1] for part in parts)
        return torch.cat([*parts, x.new_zeros(len(x), missing)], -1)

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """The full depth, from an empty state: packed ids [T] -> logits [T, vocab_size]. For training."""
        rows = self.embed(ids)
        for node in self.path().nodes:
            rows = self.run(node.stage, rows, batch.at_depth(node.depth), None)
        return self.logits(rows)

    def flops_per_token(self, units: float | None = None) -> float:
        def of(stage: Stage) -> float:
            blocks = [self.blocks[i] for i in stage.layers]
            return sum(2 * sum(p.numel() for p in block.parameters()) + block.flops() for block in blocks)

        outside = sum(of(stage) for i, stage in enumerate(self.stages) if i != self.core)
        head = 2 * self.vocab_size * self.hidden_size
        return head + outside + of(self.stages[self.core]) * (self.depths if units is None else units)
