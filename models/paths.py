"""The way of a token through the stages of a model."""

from dataclasses import dataclass

NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Node:
    """One pass through one stage."""

    stage: int
    depth: int = 0  # which instance of the stage's state
    occurrence: int = (
        0  # which of the sequence's slots holds it: a repeated layer of a chain has one for each pass
    )
    units: int = 0  # depth that a token has reached once it is through; 0 where a stage adds none
    exit_to: int = NOWHERE  # node that a token goes to if it leaves here early


@dataclass(frozen=True, slots=True)
class Path:
    """Nodes in order. The last one ends with the head: a token that is through it is ready to be sampled."""

    nodes: tuple[Node, ...]
    width: float = 1.0  # share of heads and hidden units that tokens on it use

    @property
    def full_depth(self) -> int:
        return max(node.units for node in self.nodes)

    @property
    def exits(self) -> list[int]:
        """The depths at which a token may be done, rising; the full depth is the last."""
        return sorted({node.units for node in self.nodes if node.exit_to != NOWHERE} | {self.full_depth})

    def deepest(self, high: float, low: int = 0) -> int:
        """The deepest exit up to `high`, or the first from `low` on where none of these is."""
        exits = [depth for depth in self.exits if depth >= low]
        return max((depth for depth in exits if depth <= high), default=exits[0])

    @property
    def slots(self) -> int:
        """Slots that a sequence on this path needs."""
        return 1 + max(node.occurrence for node in self.nodes)
