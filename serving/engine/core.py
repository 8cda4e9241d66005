"""The nouns that everyone in the engine shares."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.paths import NOWHERE
from serving.engine.depth import DepthPolicy
from serving.engine.news import FinishReason
from serving.engine.params import SamplingParams

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class Request:
    """A prompt, and what is wanted of it: continuations, (score) the log-probabilities of its own tokens, or (embed)
    one vector for all of it."""

    id: str
    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    resumed: list[int] = field(default_factory=list)  # of its continuation: generated elsewhere before
    state: bytes = b""  # a snapshot of the state after a beginning of its tokens
    keep: bool = False  # its last news is to bring a snapshot
    score: bool = False
    embed: str = ""  # "mean" or "last": of the normed hidden vectors that the head would see
    seed: int = 0  # of continuation 0
    priority: int = 0  # larger goes first
    owner: str = ""  # who asks, by the name of a key: those who wait are served in turn
    deadline: float | None = None  # on the engine's clock
    arrival: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    policy: DepthPolicy = field(default_factory=DepthPolicy)  # that holds: its own, or the model's default
    matcher: Any = None  # of params.grammar, before the first token (see engine/grammar.py)
    sequences: "list[Sequence]" = field(default_factory=list)
    restored: Any = None  # `state`, read (see engine/memory.py)
    cached: int = 0  # tokens whose state was restored
    miss: str = ""  # why no more were

    @property
    def given(self) -> list[int]:
        """All tokens that there are before the first one is generated here."""
        return self.prompt + self.resumed if self.resumed else self.prompt

    @property
    def reads_only(self) -> bool:
        """Whether nothing is generated: the prompt is all that there will be."""
        return self.score or bool(self.embed)


@dataclass(slots=True)
class Sequence:
    """One continuation of a request while it holds a slot."""

    request: Request
    index: int
    slot: int
    seed: int
    slots: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  # all that it holds, `slot` first
    path: int = 0
    prefilled: int = 0  # prompt tokens whose state is in the slots
    tokens: list[int] = field(default_factory=list)  # of its continuation, so far
    counted: int = 0  # predictions made here, and
    units: int = 0  # the depth of all of them together
    marks: list[int] = field(default_factory=list)  # lengths of its beginning after which to keep the state
    snapshot_at: int = 0  # tokens of prompt and continuation at its newest snapshot
    digested: Any = None  # (so many of them, their running digest) for that
    tainted: bool = False  # its depths were not those of its policy alone: nobody else may have its state
    embedding: Any = 0.0  # [hidden_size] float64, of the prompt so far
    finished: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens of its prompt and its continuation so far."""
        return len(self.request.prompt) + len(self.tokens)


@dataclass(slots=True)
class Chunk:
    """Prompt tokens of one sequence that walk through the stages together. Those that leave early wait, and join the
    others again where their paths meet."""

    sequence: Sequence
    ids: Ints
    start: int  # position of the first
    active: Ints  # indices of the tokens that are walking
    units: Ints  # depth that each has reached
    reasons: Ints
    streaks: Ints  # passes in a row after which its prediction was the same as before
    node: int = 0
    since: int = 0  # the tick at which it was parked
    meet: int = NOWHERE  # node where those that have left wait
    fills: bool = False  # those that have left pass along, to write what they skip
    rows: Any = None  # the runner's, between stages: [len(ids), row width]

    @property
    def passing(self) -> Ints:
        """Indices of the tokens that pass through the next stage."""
        return np.arange(len(self.ids)) if self.fills else self.active

    @property
    def last(self) -> bool:
        """Whether the prompt ends with it."""
        return self.start + len(self.ids) == len(self.sequence.request.given)


@dataclass(slots=True)
class Tick:
    """One run of one stage, for all rows and chunks parked there. Its tokens are those of `slots`, one each, then the
    active ones of each chunk."""

    stage: int
    slots: Ints  # decoding rows
    nodes: Ints  # where each is on its path
    places: Ints  # and in the columns of the PathTable
    waited: Ints  # ticks that each row was parked while other stages ran
    chunks: list[Chunk]
    final: bool  # the stage ends with the head
    begin: int  # rows at the beginning of their path
    wanted: dict[str, Ints] = field(default_factory=dict)  # signal -> the tokens whose policies look at it
    units: Ints | None = None  # depth that each token has reached by it
    refills: int = 0  # rows that begin while others are on their way
    prefill_tokens: int = field(init=False)  # of the chunks, which go on while the tick is looked at

    def __post_init__(self) -> None:
        self.prefill_tokens = sum(len(chunk.passing) for chunk in self.chunks)

    def tokens(self) -> tuple[Ints, Ints]:
        """For each token: the slot whose policy holds, and its node."""
        if not self.chunks:
            return self.slots, self.nodes
        lengths = [len(chunk.active) for chunk in self.chunks]
        owners, nodes = [c.sequence.slot for c in self.chunks], [c.node for c in self.chunks]
        return (
            np.concatenate([self.slots, np.repeat(owners, lengths)]),
            np.concatenate([self.nodes, np.repeat(nodes, lengths)]),
        )


@dataclass(slots=True)
class Result:
    """What a tick gave: the signals that were wanted, or, after a final stage, what was sampled."""

    signals: dict[str, Floats] = field(
        default_factory=dict
    )  # signal -> a value for each token that wanted it
    sampled: "Sampled | None" = None


@dataclass(slots=True)
class Sampled:
    """What the head gave: a token for each of `slots`, and log-probabilities for each scored prompt token."""

    slots: Ints
    ids: Ints
    logprobs: Floats | None = None  # [R]; where any row asked for them
    top_ids: Ints | None = None  # [R, most asked for]
    top_logprobs: Floats | None = None
    scores: dict[int, Floats] = field(
        default_factory=dict
    )  # slot -> one for each token of its chunk but the last
    score_tops: dict[int, tuple[Ints, Floats]] = field(
        default_factory=dict
    )  # slot -> likeliest ids there, and theirs
    embeddings: dict[int, npt.NDArray[np.float64]] = field(
        default_factory=dict
    )  # slot -> what its chunk adds
