"""Looped models: a prelude, a core that a token passes as often as it needs, and a coda.

Recursive transformers (arXiv 2410.20672), and the same over any other mixer: a looped GLA keeps constant memory and
adapts its depth. Every pass through the core has a state of its own, unless the model shares it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kernels.depth.rows_numba import gated_rows_numba
from kernels.linear import few_rows
from kernels.pool import Floats, array_of, as_float32, inference, tensor_of
from models.batch import Batch
from models.decoder import Decoder, Stage
from models.depth.lora import TokenDepths
from models.layers import Linear
from models.mixers.attention import Attention
from models.paths import NOWHERE, Node, Path
from models.state import LayerLayout, LayerState, Layout

Skipped = Literal["absent", "shared", "last_exited", "propagate"]
"""What later tokens see of a token at the depths that it skipped: nothing (recursion-wise caching); the one state that
all depths read, written at the first; what it wrote at the last depth that it reached; what it would have written had
it kept the hidden vector with which it left."""


@dataclass(frozen=True, slots=True)
class Loop:
    """How a stack of layers is looped."""

    depths: int  # passes through the core at most
    prelude: int = 0  # layers before it
    coda: int = 0  # layers after it
    skipped: Skipped = "absent"
    sequence: bool = False  # each layer of the core is repeated before the next one
    norm_each: bool = False  # the final norm runs after every pass, and not again before the head
    gate: bool = False  # an exit gate looks at the token after every pass
    entry: bool = False  # a token may leave before its first pass


class LoopedDecoder(Decoder):
    """A row is the hidden vector x, then the columns `rest` that a kind of looped model carries beside it, then, where
    skipped depths are `last_exited`, what each layer of the core was last given, and at which depth."""

    def __init__(
        self,
        embeddings: nn.Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        lm_head: Linear | None,
        loop: Loop,
        **options: Any,
    ):
        super().__init__(embeddings, layers, norm, lm_head, **options)
        self.loop = loop
        self.chains = False
        self.fills = loop.skipped in ("last_exited", "propagate")
        self.token_depths = TokenDepths()
        end = len(layers) - loop.coda
        core = range(loop.prelude, end)
        prelude = [Stage("prelude", range(loop.prelude))] if loop.prelude or loop.entry else []
        cores = (
            [Stage(f"core {i}", range(i, i + 1)) for i in core] if loop.sequence else [Stage("core", core)]
        )
        self.stages = (*prelude, *cores, Stage("coda", range(end, len(layers)), head=True))
        self.cores = range(len(prelude), len(prelude) + len(cores))
        if loop.gate:
            self.early_exit_gate = Linear(embeddings.embedding_dim, 1)
            self.signals = {"gate": embeddings.embedding_dim}
        self._gate: tuple[Floats, np.float32] | None = None  # its weights, for decoding on a CPU
        self.share_entries()

    def prepare(self) -> None:
        super().prepare()
        if self.loop.gate and self.early_exit_gate.blocked is not None:
            weight, bias = self.early_exit_gate.weight, self.early_exit_gate.bias
            self._gate = as_float32(weight[0]), np.float32(bias[0])

    def share_entries(self) -> None:
        """Where the depths share their entries, let the attention of the core know."""
        core = [self.layers[i] for stage in self.cores for i in self.stages[stage].layers]
        for module in (m for layer in core for m in layer.modules()):
            if isinstance(module, Attention):
                module.shared, module.newest = self.loop.skipped == "shared", self.loop.sequence

    # What kinds of looped models differ in.

    @property
    def rest(self) -> int:
        """Columns beside the hidden vector. Of a gate: the probability that the token is still there."""
        return 1 if self.loop.gate else 0

    def begin(self, x: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """Before the first pass: x [T, D] as the prelude left it -> x, rest [T, rest]. Without a prelude there is no
        batch yet."""
        rest = x.new_zeros(len(x), self.rest)
        if self.loop.gate:
            rest[:] = 1.0
        return x, rest

    def enter(self, rows: Tensor, batch: Batch) -> Tensor:
        """What a pass of rows [T, row_width] begins with, [T, D]."""
        return self.hidden(rows)

    def leave(self, before: Tensor, x: Tensor, rest: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """After a pass that had begun with the rows `before` [T, D]: x, rest."""
        if self.loop.norm_each:
            x = self.norm(x)
        if self.loop.gate:
            stays = torch.sigmoid(-self.early_exit_gate(x.to(self.dtype)).float())
            rest = (rest.float() * stays).to(x.dtype)
        return x, rest

    def end(self, rows: Tensor) -> Tensor:
        """What the coda of rows [T, row_width] begins with, [T, D]."""
        return self.hidden(rows)

    # What may have a way of its own on a CPU.

    def first_rows(self, x: Tensor, batch: Batch | None) -> Tensor:
        """`begin`, as rows [T, row_width]."""
        if self._gate is not None and inference(x) and self.row_width == self.hidden_size + 1:
            out = np.ones((len(x), self.row_width), np.float32)
            out[:, :-1] = array_of(x)
            return tensor_of(out)
        return self._row(*self.begin(x, batch))

    def next_rows(self, rows: Tensor, x: Tensor, batch: Batch, *kept: Tensor) -> Tensor:
        """`leave`, as rows: of rows [T, row_width], and what a pass made of them, x [T, D]."""
        D, gate = self.hidden_size, self._gate
        if gate is not None and inference(x) and not kept:
            x = self.norm(x) if self.loop.norm_each else x
            out = np.empty((len(x), D + 1), np.float32)
            gated_rows_numba(as_float32(rows), as_float32(x), *gate, out)
            return tensor_of(out)
        return self._row(*self.leave(rows[:, :D], x, self.beside(rows), batch), *kept)

    def signal(self, name: str, rows: Tensor, index: Tensor | None = None) -> Tensor:
        """As every decoder; of a gate, the probability that the token has left. What rows carry is its complement: in
        lower precision that is near 0 to many digits, and this is not near 1."""
        value = super().signal(name, rows, index)
        if name != "gate":
            return value
        return tensor_of(1 - array_of(value)) if inference(value) else 1 - value

    # What they have in common.

    def hidden(self, rows: Tensor) -> Tensor:
        """Of rows [T, row_width], [T, D]."""
        if rows.shape[1] == self.hidden_size:
            return rows
        if few_rows(rows):
            return tensor_of(np.ascontiguousarray(array_of(rows)[:, : self.hidden_size]))
        return rows[:, : self.hidden_size]

    def beside(self, rows: Tensor) -> Tensor:
        """Their columns `rest`."""
        return rows[:, self.hidden_size : self.hidden_size + self.rest]

    @property
    def row_width(self) -> int:
        kept = len(self.stages[self.cores[0]].layers) * self.hidden_size + 1
        return self.hidden_size + self.rest + (kept if self.loop.skipped == "last_exited" else 0)

    def path(self) -> Path:
        passes = self.loop.depths
        coda = self.cores[0] + len(self.cores) * passes
        nodes = [Node(s, exit_to=coda if self.loop.entry else NOWHERE) for s in range(self.cores[0])]
        for number, stage in enumerate(self.cores, 1):
            for depth in range(passes):
                if not self.loop.sequence:
                    nodes.append(Node(stage, depth, units=depth + 1, exit_to=coda))
                elif depth + 1 < passes:
                    nodes.append(Node(stage, depth))
                else:  # a layer that is done with all its repeats adds one to the depth
                    nodes.append(Node(stage, depth, units=number, exit_to=coda))
        return Path((*nodes, Node(self.cores.stop)))

    def layout(self) -> Layout:
        layers = [LayerLayout(block.leaves()) for block in self.blocks]
        for group, stage in enumerate(self.cores, 1):
            for i in self.stages[stage].layers:
                leaves, shared = layers[i].leaves, self.loop.skipped == "shared"
                layers[i] = LayerLayout(leaves, self.loop.depths, shared, group)
        return Layout(tuple(layers))

    def appends(self, stage: int, depths: Tensor) -> dict[int, Tensor]:
        appended = super().appends(stage, depths)
        if self.loop.skipped == "shared" and stage in self.cores:
            return {group: torch.where(at > 0, -1, at) for group, at in appended.items()}
        return appended

    def embed(self, ids: Tensor) -> Tensor:
        """As every decoder; before a prelude, the hidden vectors alone, which is all that it looks at."""
        x = super().embed(ids)
        return x if self.cores[0] else self.first_rows(x, None)

    def run(self, stage: int, rows: Tensor, batch: Batch, states: Sequence[LayerState] | None) -> Tensor:
        """As every decoder; the last stage returns the hidden vectors alone."""
        if stage in self.cores:
            return self._pass(stage, rows, batch, states)
        if stage < self.cores.start:
            return self.first_rows(super().run(stage, self.hidden(rows), batch, states), batch)
        return super().run(stage, self.end(rows), batch, states)

    def fill(self, stage: int, rows: Tensor, batch: Batch, states: Sequence[LayerState]) -> None:
        """As every decoder; with `last_exited`, each layer is given what it was given last, at the depth of then."""
        last_exited = self.loop.skipped == "last_exited"
        self.token_depths.value = rows[:, -1].long() if last_exited else batch.token_depths
        x, kept = rows[:, : self.hidden_size], rows[:, self.hidden_size + self.rest :]
        for j, i in enumerate(self.stages[stage].layers):
            at = slice(j * self.hidden_size, (j + 1) * self.hidden_size)
            self.blocks[i].fill(kept[:, at] if last_exited else x, batch, states[i])

    def normed(self, rows: Tensor) -> Tensor:
        return rows if self.loop.norm_each else self.norm(rows)

    def intermediate(
        self, rows: Tensor, index: Tensor, batch: Batch, states: Sequence[LayerState] | None
    ) -> Tensor:
        return self.normed(self.end(rows.index_select(0, index)))

    def _pass(self, stage: int, rows: Tensor, batch: Batch, states: Sequence[LayerState] | None) -> Tensor:
        """One pass through a core. Ghosts give each layer what they gave it last, or their hidden vector."""
        depths = batch.token_depths
        last_exited = self.loop.skipped == "last_exited"
        if batch.ghosts is None and not last_exited:
            self.token_depths.value = depths
            y = super().run(stage, self.enter(rows, batch), batch, states)
            return self.next_rows(rows, y, batch)
        ghosts = None if batch.ghosts is None else batch.ghosts[:, None]
        kept = None
        if last_exited:
            kept = rows[:, self.hidden_size + self.rest : -1].unflatten(-1, (-1, self.hidden_size))
            if batch.ghosts is not None:
                depths = torch.where(batch.ghosts, rows[:, -1].long(), depths)
        self.token_depths.value = depths
        x, y, given = rows[:, : self.hidden_size], self.enter(rows, batch), []
        for j, i in enumerate(self.stages[stage].layers):
            if ghosts is not None:
                y = torch.where(ghosts, x if kept is None else kept[:, j], y)
            given.append(y)
            y = self.layers[i](y, batch, None if states is None else states[i])
        keeping = (*given, depths[:, None].to(x.dtype)) if last_exited else ()
        after = self.next_rows(rows, y, batch, *keeping)
        return after if ghosts is None else torch.where(ghosts, rows, after)

    def _row(self, x: Tensor, rest: Tensor, *kept: Tensor) -> Tensor:
        if self.row_width == self.hidden_size:
            return x
        parts = [x, rest, *kept]
        missing = self.row_width - sum(part.shape[1] for part in parts)
        return torch.cat([*parts, x.new_zeros(len(x), missing)] if missing else parts, -1)

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        """The full depth, from an empty state: packed ids [T] -> logits [T, vocab_size]. For training."""
        rows = self.embed(ids)
        for node in self.path().nodes:
            rows = self.run(node.stage, rows, batch.at_depth(node.depth), None)
        return self.logits(rows)
