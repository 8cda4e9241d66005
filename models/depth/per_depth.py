"""Weights that may differ from depth to depth, where a checkpoint unties what it otherwise shares."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.decoder import Mixer
from models.depth.lora import TokenDepths
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

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.copies[0] is self.copies[-1]:
            return cast("Tensor", self.copies[0](x, *args))
        depths = self._depths.value
        present = depths.unique().tolist()
        if len(present) == 1:
            return cast("Tensor", self.copies[present[0]](x, *args))
        out = torch.empty_like(x)
        for depth in present:
            out_at, made = self._at(depth, x, *args)
            out[out_at] = made
        return out

    def _at(self, depth: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens at one depth, and what its copy makes of them."""
        tokens = (self._depths.value == depth).nonzero().squeeze(1)
        return tokens, self.copies[depth](x[tokens])


class MixerPerDepth(PerDepth, Mixer):
    """The same for mixers, whose state is by depth already."""

    def leaves(self) -> LayerLeaves:
        return cast("Mixer", self.copies[0]).leaves()

    def flops(self) -> int:
        return cast("Mixer", self.copies[0]).flops()

    def _at(  # type: ignore[override]
        self, depth: int, x: Tensor, batch: Batch, state: LayerState | None
    ) -> tuple[Tensor, Tensor]:
        part, tokens = batch.select(batch.depths == depth)
        return tokens, self.copies[depth](x[tokens], part, state)
