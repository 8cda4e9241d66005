"""What the fake server knows: when each token of a request is due, whatever the protocol."""

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.clock import LoopClock


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Delays in seconds."""

    ttft: float = 0.05
    itl: float = 0.005
    tokens_per_message: int = 1
    slots: int = 0  # requests served at a time, the others wait; 0 for any number
    queue: int = 0  # requests that may wait before more are refused; 0 for any number
    fail_every: int = 0  # every so many requests fail; 0 for none
    fail_status: str = "INTERNAL"
    model: str = "fake"
    max_tokens: int = 1 << 20
    vocab_size: int = 256
    max_depth: int = 4


Emit = Callable[[list[int], bool], bool]
"""(token ids, whether they are the last) -> whether anybody still listens."""


class RefusedError(Exception):
    """A request that is not served."""

    def __init__(self, status: str, detail: str):
        super().__init__(detail)
        self.status = status


class Fake:
    """Hands out tokens at their times, whatever the protocol."""

    def __init__(self, behaviour: Behaviour, clock: LoopClock):
        self.behaviour = behaviour
        self.clock = clock
        self.requests = 0
        self.late = array("d")  # seconds from when a message was due to when it was sent
        self._active = 0
        self._waiting: deque[tuple[int, Emit]] = deque()

    def generate(self, now: float, asked: int, emit: Emit) -> None:
        """Begin a request that was read at `now`. Raises RefusedError."""
        behaviour = self.behaviour
        self.requests += 1
        if behaviour.fail_every and self.requests % behaviour.fail_every == 0:
            raise RefusedError(behaviour.fail_status, "this request was to fail")
        if behaviour.slots and self._active >= behaviour.slots:
            if behaviour.queue and len(self._waiting) >= behaviour.queue:
                raise RefusedError("RESOURCE_EXHAUSTED", f"{behaviour.queue} requests wait already")
            self._waiting.append((asked, emit))
            return
        self._begin(now, asked, emit)

    def _begin(self, now: float, asked: int, emit: Emit) -> None:
        self._active += 1
        # The first message is due with the first token, whatever it holds.
        count = min(asked, self.behaviour.tokens_per_message)
        self.clock.at(now + self.behaviour.ttft, self._step, now + self.behaviour.ttft, 0, count, asked, emit)

    def _step(self, due: float, first: int, count: int, asked: int, emit: Emit) -> None:
        self.late.append(self.clock.now() - due)
        behaviour, end = self.behaviour, first + count
        listening = emit([7 + i % (behaviour.vocab_size - 7) for i in range(first, end)], end == asked)
        if listening and end < asked:
            more = min(asked - end, behaviour.tokens_per_message)
            then = due + more * behaviour.itl
            self.clock.at(then, self._step, then, end, more, asked, emit)
            return
        self._active -= 1
        if self._waiting:
            waiting, told = self._waiting.popleft()
            self._begin(self.clock.now(), waiting, told)

    def report(self) -> dict[str, Any]:
        """How well the delays were kept: milliseconds that messages were late."""
        late = np.array(self.late) * 1e3 if self.late else np.zeros(1)
        shares = {"p50": 50.0, "p99": 99.0}
        lateness = {name: round(float(np.percentile(late, p)), 4) for name, p in shares.items()}
        return {
            "requests": self.requests,
            "messages": len(self.late),
            "late_ms": {"mean": round(float(late.mean()), 4), **lateness},
        }
