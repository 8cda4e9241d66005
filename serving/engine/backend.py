"""What the engine asks of whatever runs its ticks: the seam between scheduling and tensors."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from models.paths import Path
from serving.engine.core import Ints, Result, Sequence, Tick
from serving.engine.depth import DepthPolicy
from serving.engine.paths import PathTable
from serving.engine.prefix import Saved
from serving.engine.rows import Rows


class Runner(Protocol):
    """What the engine asks of whatever runs its ticks."""

    vocab_size: int
    token_capacity: int | None  # entries of growing state that fit; None where the model has none
    first_stage: int | None  # at which tokens begin; None where they come back to it
    final_stages: frozenset[int]
    default_depth: DepthPolicy
    draws: bool  # the model itself draws at random, from the seed of the sequence
    fills: bool  # tokens that leave early write what they skip
    one_by_one: frozenset[str]  # signals for which the tokens of a prompt have to come singly

    def path(self, policy: DepthPolicy) -> Path:
        """The path of tokens under a policy. Raises InvalidArgumentError for one that the model cannot follow."""

    def admit(self, sequence: Sequence, endings: Seq[int]) -> None:
        """Take a sequence's slots into service, their state as before the first token."""

    def fork(self, source: Sequence, target: Sequence) -> None:
        """Give a sequence in service the state of another."""

    def save(self, sequence: Sequence, above: Saved | None) -> Saved:
        """A copy of a sequence's state, between two of its tokens; where states grow, what was added since `above`,
        an earlier state of the same tokens."""

    def load(self, sequence: Sequence, chain: Seq[Saved]) -> None:
        """Give a sequence in service a state that was saved, with those that it was saved on top of before it."""

    def export(self, sequence: Sequence, about: dict[str, Any]) -> Callable[[], bytes]:
        """A snapshot of a sequence's state, between two of its tokens, with JSON values that `parse` gives back. Its
        bytes are written when they are asked for, by any thread."""

    def parse(self, snapshot: bytes) -> tuple[Saved, dict[str, Any]]:
        """What was exported. Raises DataLossError, or FailedPreconditionError where it is of another model."""

    def release(self, sequence: Sequence) -> None:
        """Take back what a sequence holds beside its slots."""

    def run(self, tick: Tick, rows: Rows, paths: PathTable) -> Result:
        """Run the tick's stage; a final stage gives tokens for its rows and for the ends of its prompts."""

    def skip(self, tick: Tick, skipped: list[tuple[int, Ints, Ints]], rows: Rows) -> None:
        """Write the state of what decoding rows skip; only asked for where `fills`."""

    def flops(self, path: Path, units: float | None = None, reach: float | None = None) -> float:
        """Floating-point operations of a token on a path, to the end or to a depth; with what it writes from there to
        the depth `reach`, where the model writes."""
