"""The way of a token through the stages of a model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """One pass through one stage."""

    stage: int
    depth: int = 0  # which instance of the stage's state
    units: int = 1  # depth that a token has reached once it is through
    exit_to: int | None = None  # node that a token goes to if it leaves here early


@dataclass(frozen=True, slots=True)
class Path:
    """Nodes in order. The last one ends with the head: a token that is through it is ready to be sampled."""

    nodes: tuple[Node, ...]

    @property
    def full_depth(self) -> int:
        return self.nodes[-1].units

    def next(self, node: int, leave: bool) -> int | None:
        """The node after this one; None when the token is through."""
        if leave and (target := self.nodes[node].exit_to) is not None:
            return target
        return node + 1 if node + 1 < len(self.nodes) else None
