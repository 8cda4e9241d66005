"""Pages: memory for what grows with a sequence."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.paging import PAGE, pages_for

PADDING_PAGE = 0

Ints = npt.NDArray[np.int64]


class Pages:
    """Which pages each (slot, depth) holds, for one group of layers. Page 0 is padding and belongs to nobody."""

    def __init__(self, slots: int, depths: int, tokens: int, longest: int, device: torch.device | str):
        """Pages for `tokens` tokens of all sequences together at each of the depths, `longest` of one sequence. A
        sequence leaves part of its last page empty; that part counts as its own."""
        self.count = depths * (tokens // PAGE)
        self.tables = torch.zeros(slots + 1, depths, pages_for(longest), dtype=torch.int64, device=device)
        self.held = np.zeros((slots + 1, depths), np.int64)  # pages of each
        self.entries = np.zeros((slots + 1, depths), np.int64)
        self._free = list(range(self.count, 0, -1))

    @property
    def available(self) -> int:
        return len(self._free)

    def reach(self, slots: Ints, depths: Ints, entries: Ints) -> None:
        """Make room for so many entries at each (slot, depth), if there is less. Raises IndexError when no page is
        left: admission looks first."""
        reached = np.maximum(self.entries[slots, depths], entries)
        self.entries[slots, depths] = reached
        wanted = -(-reached // PAGE)
        for at in np.flatnonzero(wanted > self.held[slots, depths]).tolist():
            self._grow(int(slots[at]), int(depths[at]), int(wanted[at]))

    def _grow(self, slot: int, depth: int, pages: int) -> None:
        held = int(self.held[slot, depth])
        new = [self._free.pop() for _ in range(pages - held)]
        self.tables[slot, depth, held:pages] = torch.tensor(new, dtype=torch.int64)
        self.held[slot, depth] = pages

    def release(self, slot: int) -> None:
        """Give back all pages of a slot."""
        for depth in np.flatnonzero(self.held[slot]):
            held = int(self.held[slot, depth])
            self._free += self.tables[slot, depth, :held].tolist()
            self.tables[slot, depth, :held] = PADDING_PAGE
        self.held[slot] = 0
        self.entries[slot] = 0

    def gather(self, paged: Tensor, slot: int, depth: int, first: int = 0) -> Tensor:
        """The entries of a (slot, depth) from the given one on, in order: [T, *shape]."""
        held, entries = int(self.held[slot, depth]), int(self.entries[slot, depth])
        page = first // PAGE
        whole = paged[self.tables[slot, depth, page:held]].flatten(0, 1)
        return whole[first - page * PAGE : entries - page * PAGE].clone()

    def scatter(self, paged: Tensor, slot: int, depth: int, entries: Tensor) -> None:
        """The reverse, into a (slot, depth) whose tables may be there already, from another leaf of the group."""
        self.reach(np.array([slot]), np.array([depth]), np.array([len(entries)]))
        for page in range(pages_for(len(entries))):
            part = entries[page * PAGE : (page + 1) * PAGE]
            paged[int(self.tables[slot, depth, page]), : len(part)] = part
