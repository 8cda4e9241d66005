"""The prefix cache: states of prefixes that were computed before, found by exact token ids.

A radix tree, one for each depth policy (what a policy skips shows in the state). A node ends at a position where a
state was saved, or where two prompts part. When memory runs out, the state that costs least to compute again per byte
goes first, with those that were not asked for lately cheapest (GreedyDual-Size, Cao and Irani 1997).
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from serving.engine.core import Ints

SHORTEST = 16  # tokens: a state is not saved for less, nor so near to another one
MOST_GHOSTS = 4096  # nodes that only remember that there was a state
GHOSTS_SHARE = 0.125  # of the budget that edges take, from which on nobody is remembered who has no state
NODE_BYTES = 512  # of a node itself, about
MOST_POLICIES = 64  # whose trees are looked at for the reason of a miss, the newest first


class Saved(Protocol):
    """A state of one sequence, kept apart from any slot."""

    @property
    def nbytes(self) -> int: ...


class Miss(StrEnum):
    """Why no more of a prompt was restored."""

    NONE = ""  # all of it that could be
    DISABLED = "disabled"
    SHORT = "short"  # the prompt is not worth a saved state
    SCORED = "scored"  # every token's log-probability was asked for
    UNSEEN = "unseen"  # nobody had these tokens before
    POLICY = "policy"  # only under another depth policy
    EVICTED = "evicted"
    BETWEEN = "between_snapshots"  # seen before, but the next saved state lies beyond where this prompt parts


Edge = npt.NDArray[np.int32]


def edge_bytes(tokens: int) -> int:
    """That a node takes beside its state."""
    return NODE_BYTES + 4 * tokens


@dataclass(eq=False, slots=True)
class Node:
    """The tokens from its parent's end to its own."""

    parent: "Node | None"
    edge: Edge
    end: int  # tokens from the root
    children: "dict[int, Node]" = field(default_factory=dict)
    saved: Saved | None = None
    since: int = 0  # the state holds what was added after so many tokens
    value: float = 0.0  # what it is worth keeping for; the least goes first
    evicted: bool = False
    key: Hashable = None  # of a root: under which policy of depth its states were made

    def lineage(self) -> "Iterator[Node]":
        """This node and those above it, bottom up, as far as they hold states."""
        node: Node | None = self
        while node is not None:
            if node.saved is not None:
                yield node
            node = node.parent


@dataclass(frozen=True, slots=True)
class Match:
    """What is known of a prompt."""

    node: Node | None  # the deepest node with a state
    seen: int  # tokens that some prompt before had in common with it
    miss: Miss

    @property
    def tokens(self) -> int:
        """How many the state covers."""
        return 0 if self.node is None else self.node.end


class PrefixCache:
    """States by prefix, within a budget of bytes."""

    def __init__(
        self,
        budget: int,
        *,
        grows: bool = False,
        most_ghosts: int = MOST_GHOSTS,
        edge_bytes: Callable[[int], int] = edge_bytes,
    ):
        """`grows`: a saved state holds only what its prefix adds to the one above it, so that one cannot go before
        those below it. `edge_bytes`: what a node with so many tokens takes beside its state."""
        self.budget = budget
        self.state_bytes = 0
        self.edges_bytes = 0  # of the tree itself
        self._edge_bytes = edge_bytes
        self.evictions = 0
        self._grows = grows
        self._most_ghosts = most_ghosts
        self._roots: dict[Hashable, Node] = {}
        self._inflation = 0.0  # value of the last state that had to go
        self._states: dict[Node, None] = {}
        self._ghosts: OrderedDict[Node, None] = OrderedDict()

    @property
    def bytes(self) -> int:
        """All that counts against the budget."""
        return self.state_bytes + self.edges_bytes

    def match(self, key: Hashable, ids: Ints, most: int) -> Match:
        """The longest saved prefix of `ids`, at most `most` tokens of it."""
        if self.budget <= 0:
            return Match(None, 0, Miss.DISABLED)
        node, seen = self._walk(key, ids)
        found = next((n for n in node.lineage() if n.end <= most), None)
        if found is not None:
            self._touch(found)
        if len(ids) < SHORTEST:
            return Match(found, seen, Miss.NONE if found is not None and found.end == most else Miss.SHORT)
        return Match(found, seen, self._reason(key, ids, node, found, seen, most))

    def insert(self, key: Hashable, ids: Ints, save: Callable[[Saved | None], Saved]) -> None:
        """Keep the state after these tokens. `save` makes it, from the state above it where states grow."""
        node = self._make(key, ids)
        if node.saved is not None:
            return
        above = next(node.lineage(), None) if self._grows else None
        saved = save(None if above is None else above.saved)
        if saved.nbytes + self._edge_bytes(len(node.edge)) > self.budget:
            self._prune(node)
            return
        node.saved, node.evicted, node.since = saved, False, 0 if above is None else above.end
        self._ghosts.pop(node, None)
        self._states[node] = None
        self.state_bytes += saved.nbytes
        self._touch(node)
        self._evict(node)

    def chain(self, node: Node) -> list[Saved]:
        """What it takes to restore a state: itself, and above it what it was saved on top of, from the top."""
        parts, since = [node], node.since
        for above in node.lineage():
            if above is not node and above.end == since and since:
                parts.append(above)
                since = above.since
        return [n.saved for n in reversed(parts) if n.saved is not None]

    def holds(self, key: Hashable, ids: Ints) -> bool:
        """Whether the state after exactly these tokens is kept."""
        node, seen = self._walk(key, ids)
        return seen == len(ids) == node.end and node.saved is not None

    def __len__(self) -> int:
        return len(self._states)

    def _walk(self, key: Hashable, ids: Ints) -> tuple[Node, int]:
        """The deepest node whose tokens all begin `ids`, and how far the tree goes on with them beyond it."""
        node = self._roots.get(key) or _root(key)
        while node.end < len(ids):
            child = node.children.get(int(ids[node.end]))
            if child is None:
                break
            common = _common(child.edge, ids[node.end :])
            if common < len(child.edge):
                return node, node.end + common
            node = child
        return node, node.end

    def _make(self, key: Hashable, ids: Ints) -> Node:
        """The node that ends with these tokens, made where there is none."""
        self._roots.setdefault(key, _root(key))
        node, seen = self._walk(key, ids)
        if seen > node.end:  # inside an edge: cut it in two
            below = node.children[int(ids[node.end])]
            cut = seen - node.end
            middle = Node(node, below.edge[:cut].copy(), seen, {int(below.edge[cut]): below})
            node.children[int(ids[node.end])] = middle
            self.edges_bytes -= self._edge_bytes(len(below.edge))
            below.parent, below.edge = middle, below.edge[cut:].copy()
            self.edges_bytes += self._edge_bytes(len(middle.edge)) + self._edge_bytes(len(below.edge))
            node = middle
        if node.end < len(ids):
            leaf = Node(node, ids[node.end :].astype(np.int32), len(ids))
            node.children[int(ids[node.end])] = leaf
            self.edges_bytes += self._edge_bytes(len(leaf.edge))
            node = leaf
        return node

    def _touch(self, node: Node) -> None:
        """Worth, from now on, what it would cost to compute it again per byte."""
        assert node.saved is not None
        above = next((n.end for n in node.lineage() if n is not node), 0)
        node.value = self._inflation + (node.end - above) / max(1, node.saved.nbytes)

    def _evict(self, spared: Node) -> None:
        """Until all fits: those who only remember go where they take much, then states, then what is left."""
        while self._shed_ghosts() > self.budget:
            others = (n for n in self._states if n is not spared and self._can_go(n))
            least = min(others, key=_value, default=None)
            if least is not None:
                self._drop_state(least)
            elif spared.saved is not None:  # only what it stands on is left
                self._drop_state(spared)
            elif self._ghosts:
                self._forget_ghost()
            else:
                break

    def _drop_state(self, node: Node) -> None:
        assert node.saved is not None
        self._inflation = max(self._inflation, node.value)
        self.state_bytes -= node.saved.nbytes
        self.evictions += 1
        del self._states[node]
        node.saved, node.evicted = None, True
        self._ghosts[node] = None

    def _shed_ghosts(self) -> int:
        """Forget those who are too many, or take too much; returns what all takes then."""
        while self._ghosts and (
            len(self._ghosts) > self._most_ghosts or self.edges_bytes > GHOSTS_SHARE * self.budget
        ):
            self._forget_ghost()
        return self.bytes

    def _forget_ghost(self) -> None:
        self._prune(self._ghosts.popitem(last=False)[0])

    def _can_go(self, node: Node) -> bool:
        return not self._grows or not any(_below(node))

    def _prune(self, node: Node) -> None:
        """Forget a node without a state, and those above it that only led to it. A ghost's own time has yet to come."""
        while (
            node.parent is not None and not node.children and node.saved is None and node not in self._ghosts
        ):
            del node.parent.children[int(node.edge[0])]
            self.edges_bytes -= self._edge_bytes(len(node.edge))
            node = node.parent
        if node.parent is None and not node.children and node.saved is None:
            self._roots.pop(node.key, None)

    def _reason(self, key: Hashable, ids: Ints, node: Node, found: Node | None, seen: int, most: int) -> Miss:
        covered = 0 if found is None else found.end
        if covered >= most or (covered == seen and covered > 0):
            return Miss.NONE if covered >= most else Miss.UNSEEN
        if any(n.evicted and covered < n.end <= most for n in _up(node)):
            return Miss.EVICTED
        if seen >= covered + SHORTEST:
            return Miss.BETWEEN
        others = islice(reversed(self._roots), MOST_POLICIES)  # clients may think of any number of thresholds
        elsewhere = (self._walk(other, ids)[1] for other in others if other != key)
        return Miss.POLICY if any(s >= covered + SHORTEST for s in elsewhere) else Miss.UNSEEN


def _common(a: Edge, b: Ints) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _root(key: Hashable) -> Node:
    return Node(None, np.zeros(0, np.int32), 0, key=key)


def _value(node: Node) -> float:
    return node.value


def _up(node: Node | None) -> Iterator[Node]:
    while node is not None:
        yield node
        node = node.parent


def _below(node: Node) -> Iterator[bool]:
    """Whether each node below has a state."""
    stack = list(node.children.values())
    while stack:
        child = stack.pop()
        yield child.saved is not None
        stack += child.children.values()
