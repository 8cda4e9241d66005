"""What an engine says: news of its sequences, and how busy it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"  # end of text or a stop token
    LENGTH = "length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    MOVED = "moved"  # not finished: it goes on elsewhere; no client is told


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    mean_depth: float
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int = 0
    cache_miss_reason: str = ""
    flops_saved: float = 0.0


@dataclass(slots=True)
class StateAfter:
    """A snapshot of one sequence."""

    tokens: int  # of its continuation; the state is that after all but the last of them, which has not been fed yet
    written: bytes | Callable[[], bytes]

    @property
    def data(self) -> bytes:
        """See models/snapshots.py. Written by the thread that asks for it: the engine's has other work."""
        if not isinstance(self.written, bytes):
            self.written = self.written()
        return self.written


@dataclass(slots=True)
class Output:
    """News of one sequence. Lists run in parallel; `finish_reason` comes with its last news, `usage` with the last of
    its request."""

    request_id: str
    index: int
    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    exit_reasons: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)  # in the last news, where it was asked for
    state: StateAfter | None = None  # the newest snapshot, now and then
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def cut(self, start: int = 0, stop: int | None = None) -> None:
        """Keep only these of its tokens."""
        for name in ("ids", "depths", "exit_reasons", "logprobs", "top_logprobs"):
            setattr(self, name, getattr(self, name)[start:stop])

    def extend(self, later: "Output") -> None:
        """Take in the next news of the same sequence."""
        self.ids += later.ids
        self.depths += later.depths
        self.exit_reasons += later.exit_reasons
        self.logprobs += later.logprobs
        self.top_logprobs += later.top_logprobs
        self.embedding += later.embedding
        self.state = later.state or self.state
        self.finish_reason = later.finish_reason
        self.usage = later.usage


@dataclass(frozen=True, slots=True)
class Load:
    slots: int
    running: int
    waiting: int
    queue: int  # that may wait
    crowd: str = ""  # the owner who has most of those that wait, and
    crowd_waiting: int = 0  # how many


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that the engine could not take, or lost."""

    request_id: str
    error: Exception


News = list[Output | Failed]
