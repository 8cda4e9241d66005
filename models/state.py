"""The state of a sequence: how it is laid out, and the pool that holds it for every slot.

All states of one slot lie side by side in one row of an arena [slots, floats], so that saving, forking or moving a
sequence is one copy of one contiguous run. A layer sees its part as a strided view [slots, depths, *shape].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.pool import PADDING_SLOT

ALIGNMENT = 16  # floats: one cache line


@dataclass(frozen=True, slots=True)
class Leaf:
    """One state tensor of one layer, for one sequence at one depth."""

    shape: tuple[int, ...]
    fill: float = 0.0  # its value before the first token


LayerLeaves = Mapping[str, Leaf]
LayerState = Mapping[str, Tensor]  # name -> [slots, depths, *shape]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each state tensor lies in a slot's row. `layers[i]` are layer i's leaves; `depths[i]` how many
    instances of them a sequence has (1, or one for every depth at which the layer runs)."""

    layers: tuple[LayerLeaves, ...]
    depths: tuple[int, ...]

    @staticmethod
    def of(layers: Sequence[LayerLeaves], depths: Sequence[int] | None = None) -> "Layout":
        return Layout(tuple(layers), tuple(depths or [1] * len(layers)))

    def places(self) -> tuple[list[dict[str, tuple[int, int]]], int]:
        """For each layer and leaf: (offset, floats of one depth, aligned); and the length of a row in floats."""
        at = 0
        result = []
        for leaves, depths in zip(self.layers, self.depths, strict=True):
            layer = {}
            for name, leaf in leaves.items():
                size = math.prod(leaf.shape)
                size += -size % ALIGNMENT
                layer[name] = (at, size)
                at += size * depths
            result.append(layer)
        return result, at

    @property
    def floats(self) -> int:
        return self.places()[1]

    @property
    def bytes_per_slot(self) -> int:
        return 4 * self.floats


class StatePool:
    """The states of `slots` sequences, float32; slot 0 is padding and belongs to nobody."""

    def __init__(self, layout: Layout, slots: int, device: torch.device | str = "cpu"):
        places, floats = layout.places()
        self.layout = layout
        self.slots = slots
        self.arena = torch.zeros(slots + 1, floats, device=device)
        self._blank = torch.zeros(floats, device=device)
        self.layers: list[LayerState] = []
        for leaves, depths, place in zip(layout.layers, layout.depths, places, strict=True):
            views = {}
            for name, leaf in leaves.items():
                at, size = place[name]
                self._blank[at : at + size * depths] = leaf.fill
                inner = [math.prod(leaf.shape[i + 1 :]) for i in range(len(leaf.shape))]
                views[name] = self.arena.as_strided(
                    (slots + 1, depths, *leaf.shape), (floats, size, *inner), storage_offset=at
                )
            self.layers.append(views)
        self.arena[PADDING_SLOT] = self._blank

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes

    def reset(self, slot: int) -> None:
        """The state before the first token."""
        self.arena[slot] = self._blank

    def copy(self, source: int, target: int) -> None:
        self.arena[target] = self.arena[source]

    def read(self, slot: int) -> Tensor:
        """A copy of the slot's row."""
        return self.arena[slot].clone()

    def write(self, slot: int, row: Tensor) -> None:
        self.arena[slot] = row
