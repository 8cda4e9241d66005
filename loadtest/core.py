"""The nouns that every part of the harness shares. Times are seconds of one clock; lengths are tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Model:
    """What the server says of the model that it serves. 0 and empty: it does not say."""

    name: str = ""
    family: str = ""
    parameters: int = 0
    vocab_size: int = 0
    max_tokens: int = 0  # prompt and continuation together
    eos_token_ids: tuple[int, ...] = ()
    has_tokenizer: bool = True
    depth_policies: tuple[str, ...] = ()
    max_depth: int = 0
    slots: int = 0
    replicas: int = 0
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Depth:
    """A depth policy, as fathom.v1's DepthPolicy. `label` is how the command line wrote it."""

    label: str
    policy: str  # full, fixed, router, gate, confidence, converged, chain, deadline
    depth: int = 0  # of fixed
    measure: str = ""  # of confidence and converged
    threshold: float | None = None  # the model's own where None
    layers: tuple[int, ...] = ()  # of chain
    min_depth: int | None = None
    max_depth: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Absent values are the server's choice."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    ignore_eos: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """What one request asks. Either `text` or `tokens` is the prompt."""

    text: str
    tokens: list[int] | None
    max_tokens: int
    sampling: Sampling
    seed: int
    request_id: str = ""
    session_id: str = ""
    depth: Depth | None = None
    priority: int = 0

    @property
    def prompt_tokens(self) -> int:
        """0 where only the server's tokenizer knows."""
        return len(self.tokens) if self.tokens is not None else 0


@dataclass(slots=True)
class Sample:
    """What was seen of one request."""

    intended: float  # when its user wanted it sent
    asked: int  # tokens
    policy: str = ""  # label of its depth policy
    turn: int = 0  # of its session
    keep: bool = False  # the continuation, for the next turn
    sent: float = nan
    stamps: list[float] = field(default_factory=list)  # arrival of each message that carried tokens
    counts: list[int] = field(default_factory=list)  # tokens in each of them
    end: float = nan
    status: str = ""  # name of a gRPC status, or HTTP_nnn
    detail: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    mean_depth: float = nan
    flops_saved: float = nan
    text: str = ""  # of the continuation, if kept
    tokens: list[int] = field(default_factory=list)

    def arrived(self, now: float, count: int) -> None:
        self.stamps.append(now)
        self.counts.append(count)

    def finish(self, now: float, status: str, detail: str = "") -> None:
        self.end = now
        if status == "OK" and not self.counts:
            status, detail = "NO_TOKENS", "the stream ended well, without a token"
        self.status, self.detail = status, detail


Done = Callable[[Sample], object]


class Handle(Protocol):
    """A request under way."""

    def cancel(self, status: str, detail: str) -> None:
        """Give it up, and finish its sample with this status."""
        ...


class Transport(Protocol):
    """A way to ask a server for tokens."""

    streams: bool  # tokens arrive as they are made

    async def connect(self) -> Model:
        """Reach the server and find the model. Raises TargetError or FlagError."""
        ...

    def encode(self, request: Request) -> Any:
        """What :meth:`send` takes, made ahead of time."""
        ...

    def send(self, encoded: Any, sample: Sample, done: Done) -> Handle:
        """Send now. `done` gets the sample when it is finished; never before this returns, unless it
        failed."""
        ...

    async def close(self) -> None: ...
