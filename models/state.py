"""The state of a sequence: how it is laid out, and the pool that holds it for every slot.

Constant state lies in an arena [slots, floats]: all states of one slot side by side in one row, so that saving,
forking or moving a sequence is one copy of one contiguous run. A layer sees its part as a strided view
[slots, depths, *shape]. What grows with the sequence (the keys and values of full attention) lies in pages.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.pages import Pages
from models.paging import PAGE, pages_for

ALIGNMENT = 16  # floats: one cache line
SLAB = 8 << 20  # bytes of the rows that are allocated together


@dataclass(frozen=True, slots=True)
class Leaf:
    """One state tensor of one layer, for one sequence at one depth."""

    shape: tuple[int, ...]
    fill: float = 0.0  # its value before the first token


@dataclass(frozen=True, slots=True)
class PagedLeaf:
    """One entry of this shape for every token, in pages [pages, PAGE, *shape]."""

    shape: tuple[int, ...]


LayerLeaves = Mapping[str, Leaf | PagedLeaf]
LayerState = Mapping[str, Tensor]
"""Name -> [slots, depths, *shape] of a Leaf, [pages, PAGE, *shape] of a PagedLeaf; a layer with the latter also has
"tables" [slots, depths, most pages], the page numbers of each sequence."""


def pool_of(state: LayerState | None, name: str) -> Tensor | None:
    """A kernel's pool: that of the name, or none where there is no state (training)."""
    return None if state is None else state[name]


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The state of one layer."""

    leaves: LayerLeaves
    depths: int = 1  # depths at which the layer runs
    shared: bool = False  # all depths address one instance
    group: int = 0  # layers of one group see the same tokens, and share tables

    @property
    def instances(self) -> int:
        return 1 if self.shared else self.depths

    def of_kind(self, kind: type) -> dict[str, Leaf | PagedLeaf]:
        return {name: leaf for name, leaf in self.leaves.items() if isinstance(leaf, kind)}

    @property
    def paged(self) -> bool:
        return bool(self.of_kind(PagedLeaf))


@dataclass(frozen=True, slots=True)
class Layout:
    """The state of all layers, in their order."""

    layers: tuple[LayerLayout, ...]

    @staticmethod
    def of(layers: Sequence[LayerLeaves]) -> "Layout":
        """Of a plain stack: every layer runs once."""
        return Layout(tuple(LayerLayout(leaves) for leaves in layers))

    def places(self) -> tuple[list[dict[str, tuple[int, int]]], int]:
        """For each layer and constant leaf: (offset, floats of one instance, aligned); and the row's length."""
        at = 0
        result = []
        for layer in self.layers:
            places = {}
            for name, leaf in layer.of_kind(Leaf).items():
                size = math.prod(leaf.shape)
                size += -size % ALIGNMENT
                places[name] = (at, size)
                at += size * layer.instances
            result.append(places)
        return result, at

    @property
    def bytes_per_slot(self) -> int:
        """Constant state of one sequence, however long it grows."""
        return 4 * self.places()[1]

    def bytes_per_token(self, itemsize: int = 4) -> int:
        """What each further token of a sequence adds; 0 for a model without full attention."""
        sizes = (
            layer.instances * sum(math.prod(leaf.shape) for leaf in layer.of_kind(PagedLeaf).values())
            for layer in self.layers
        )
        return itemsize * sum(sizes)

    def slots_within(self, memory: float, longest: int, itemsize: int = 4, tokens: int | None = None) -> int:
        """Sequences whose states so many bytes hold, beside that of slot 0; negative where not even that fits.

        What grows takes its share first: `tokens` entries of all sequences together, where given, and otherwise
        `longest` of each sequence, so that none can want for memory. All in whole pages, and one page of padding.
        """
        page = PAGE * self.bytes_per_token(itemsize)
        constant, pages = self.bytes_per_slot, pages_for(longest) * page
        if not self.paged:
            return int(memory // constant) - 1
        table = 8 * pages_for(longest) * sum(layer.instances for layer in self.layers if layer.paged)
        if tokens is not None:
            return int((memory - page - pages_for(tokens) * page) // (constant + table)) - 1
        return int((memory - page - constant - table) // (constant + table + pages))

    @property
    def paged(self) -> bool:
        return any(layer.paged for layer in self.layers)


@dataclass(slots=True, weakref_slot=True)
class Snapshot:
    """The state of one sequence, apart from any pool."""

    row: Tensor  # [floats]
    # Of what grows: (layer, leaf, instance) -> [T, *shape], the entries from `first` on.
    entries: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)
    first: dict[tuple[int, int], int] = field(default_factory=dict)  # (group, instance) -> entries left out
    counts: dict[tuple[int, int], int] = field(default_factory=dict)  # (group, instance) -> all entries

    @property
    def nbytes(self) -> int:
        return int(self.row.nbytes + sum(e.nbytes for e in self.entries.values()))

    def cpu(self) -> "Snapshot":
        """The same in this machine's memory."""
        if self.row.is_cpu:
            return self
        return Snapshot(
            self.row.cpu(), {key: e.cpu() for key, e in self.entries.items()}, self.first, self.counts
        )


class Slabs:
    """Rows of snapshots, of which each returns when its snapshot is dropped. Allocated one by one, between whatever
    else is allocated meanwhile, they would leave holes, of which memory grows for hours."""

    def __init__(self, like: Tensor):
        """`like`: a row."""
        self._like = like
        self._free: list[Tensor] = []

    def snapshot(self, row: Tensor) -> Snapshot:
        """Of a copy of this row."""
        if not self._free:
            count = max(1, SLAB // max(1, row.nbytes))
            self._free += self._like.new_empty(count, len(row)).unbind()
        kept = self._free.pop().copy_(row)
        snapshot = Snapshot(kept)
        weakref.finalize(snapshot, self._free.append, kept).atexit = False
        return snapshot


class StatePool:
    """The states of `slots` sequences; slot 0 is padding and belongs to nobody."""

    def __init__(
        self,
        layout: Layout,
        slots: int,
        device: torch.device | str = "cpu",
        *,
        tokens: int = 0,
        longest: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        """`tokens`: entries of all sequences together that the pages hold; `longest`: of one sequence; `dtype` of the
        pages. None of them matters to a model without full attention."""
        self.layout = layout
        self.slots = slots
        places, floats = layout.places()
        self.arena = torch.zeros(slots + 1, floats, device=device)
        self._blank = torch.zeros(floats, device=device)
        self._slabs = Slabs(self._blank)
        self.pages: dict[int, Pages] = {}  # by group
        self.layers: list[LayerState] = []
        for layer, place in zip(layout.layers, places, strict=True):
            state: dict[str, Tensor] = {}
            for name, leaf in layer.of_kind(Leaf).items():
                state[name] = self._view(layer, leaf, *place[name])
            if layer.paged:
                state |= self._paged(layer, tokens, longest, dtype)
            self.layers.append(state)
        self.arena[:] = self._blank

    def _view(self, layer: LayerLayout, leaf: Leaf | PagedLeaf, at: int, size: int) -> Tensor:
        assert isinstance(leaf, Leaf)
        self._blank[at : at + size * layer.instances] = leaf.fill
        inner = [math.prod(leaf.shape[i + 1 :]) for i in range(len(leaf.shape))]
        shape, strides = (layer.instances, *leaf.shape), (size, *inner)
        view = self.arena.as_strided(
            (self.slots + 1, *shape), (self.arena.shape[1], *strides), storage_offset=at
        )
        return view.expand(-1, layer.depths, *leaf.shape) if layer.shared else view

    def _paged(self, layer: LayerLayout, tokens: int, longest: int, dtype: torch.dtype) -> dict[str, Tensor]:
        if layer.group not in self.pages:
            self.pages[layer.group] = Pages(self.slots, layer.instances, tokens, longest, self.arena.device)
        pages = self.pages[layer.group]
        tables = pages.tables.expand(-1, layer.depths, -1) if layer.shared else pages.tables
        state = {"tables": tables}
        for name, leaf in layer.of_kind(PagedLeaf).items():
            state[name] = torch.zeros(
                pages.count + 1, PAGE, *leaf.shape, dtype=dtype, device=self.arena.device
            )
        return state

    @property
    def nbytes(self) -> int:
        paged = (
            state[n].nbytes
            for lay, state in zip(self.layout.layers, self.layers, strict=True)
            for n in lay.of_kind(PagedLeaf)
        )
        return int(self.arena.nbytes + sum(paged))

    def reset(self, slot: int) -> None:
        """The state before the first token."""
        self.arena[slot] = self._blank
        for pages in self.pages.values():
            pages.release(slot)

    def release(self, slot: int) -> None:
        """Give back what the slot holds beside its row."""
        for pages in self.pages.values():
            pages.release(slot)

    def copy(self, source: int, target: int) -> None:
        """Give one slot the state of another."""
        if not self.pages:
            self.arena[target] = self.arena[source]
        else:
            self.write(target, [self.read(source)])

    def read(self, slot: int, above: Snapshot | None = None) -> Snapshot:
        """A copy of a slot's state; of what grows only what was added since `above`, an earlier state of it."""
        snapshot = self._slabs.snapshot(self.arena[slot])
        for group, pages in self.pages.items():
            for instance, count in enumerate(pages.entries[slot].tolist()):
                snapshot.counts[group, instance] = count
                snapshot.first[group, instance] = 0 if above is None else above.counts[group, instance]
        for i, layer, name, instance in self._entries():
            first = snapshot.first[layer.group, instance]
            entries = self.pages[layer.group].gather(self.layers[i][name], slot, instance, first)
            snapshot.entries[i, name, instance] = entries
        return snapshot

    def write(self, slot: int, chain: Sequence[Snapshot]) -> None:
        """Give a slot the state of the last snapshot; those before it, each read above the one before, hold the
        beginning of what grows."""
        self.reset(slot)
        self.arena[slot] = chain[-1].row
        for i, layer, name, instance in self._entries():
            entries = torch.cat([snapshot.entries[i, name, instance] for snapshot in chain])
            self.pages[layer.group].scatter(self.layers[i][name], slot, instance, entries)

    def _entries(self) -> list[tuple[int, LayerLayout, str, int]]:
        return [
            (i, layer, name, instance)
            for i, layer in enumerate(self.layout.layers)
            for name in layer.of_kind(PagedLeaf)
            for instance in range(layer.instances)
        ]
