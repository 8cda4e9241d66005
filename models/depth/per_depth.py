"""Weights that may differ from depth to depth, where a checkpoint unties what it otherwise shares."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.depth import compact
from models.batch import Batch
from models.decoder import Mixer
from models.depth.lora import TokenDepths
from models.mixers.attention import Attention
from models.state import LayerLeaves, LayerState


class PerDepth(nn.Module):
    """A copy of a module for each depth; one for all where the copies turn out to be equal once they are loaded."""

    def __init__(self, copies: Sequence[nn.Module], token_depths: TokenDepths):
        super().__init__()
        self.copies = nn.ModuleList(copies)
        self._depths = token_depths

    @property
    def parameters_of_one_depth(self) -> int:
        return sum(p.numel() for p in self.copies[0].parameters())

    def prepare(self) -> None:
        """Keep one copy of what is tied, so that rows at any mix of depths share its matrix products."""
        first, *others = (list(copy.parameters()) for copy in self.copies)
        if all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
            self.copies = nn.ModuleList([self.copies[0]])

    def tie(self) -> None:
        """Share the first copy between all depths, for training."""
        self.copies = nn.ModuleList([self.copies[0]] * len(self.copies))

    @property
    def tied(self) -> bool:
        return self.copies[0] is self.copies[-1]

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return cast("Tensor", self.copies[0](x, *args)) if self.tied else self.grouped(_call, x)

    def grouped(self, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """work(copy, tensors of the tokens at its depth) for each depth that occurs; what it gives, in the tokens' own
        order."""
        order, bounds = compact(self._depths.value, len(self.copies))
        sorted_, ends = [x[order] for x in tensors], bounds.tolist()
        made = [
            work(copy, *(x[a:b] for x in sorted_))
            for copy, a, b in zip(self.copies, ends[:-1], ends[1:], strict=True)
            if a < b
        ]
        together = torch.cat(made)
        return torch.empty_like(together).index_copy_(0, order, together)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return cast("Tensor", module(x))


class MixerPerDepth(PerDepth, Mixer):
    """The same for mixers, whose state is by depth already."""

    def leaves(self) -> LayerLeaves:
        return cast("Mixer", self.copies[0]).leaves()

    def flops(self) -> int:
        return cast("Mixer", self.copies[0]).flops()

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        first = self.copies[0]
        depths = [] if self.tied else self._depths.value.unique().tolist()
        if len(depths) < 2:
            return cast("Tensor", self.copies[depths[0] if depths else 0](x, batch, state))
        if type(first) is Attention and not first.shared:
            return self._attention(first, x, batch, state)
        out = torch.empty_like(x)
        for depth in depths:
            part, tokens = batch.select(batch.depths == depth)
            out[tokens] = self.copies[depth](x[tokens], part, state)
        return out

    def _attention(self, first: Attention, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        """Projections by depth; what lies between them once for all."""

        def project(copy: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
            return torch.cat(cast("Attention", copy).project(x, positions), 1)

        heads = first.heads, first.kv_heads, first.kv_heads
        q, k, v = self.grouped(project, x, batch.positions).split(heads, 1)
        o = first.attend(q, k, v, batch, state).flatten(-2)
        return self.grouped(lambda copy, o: cast("Attention", copy).o_proj(o), o)
