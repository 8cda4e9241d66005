"""What an engine remembers of the prompts that it has seen: when to keep a state, and when to take one up again."""

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from serving.engine.backend import Runner
from serving.engine.core import Request, Sequence
from serving.engine.news import StateAfter
from serving.engine.prefix import SHORTEST, Miss, PrefixCache, Saved
from serving.errors import FailedPreconditionError

STRIDE = 1024
"""Tokens of a long prompt after which a state is kept at the latest."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A snapshot, read."""

    saved: Saved
    tokens: int  # that it covers
    policy: str  # of depth, under which it was made; "" where that is not known
    key: str  # whose state it may stand for


class Memory:
    """The prefix cache of one model. States are kept at the end of a prompt and of a continuation, where a prompt parts
    from what was seen before, and every STRIDE tokens."""

    def __init__(self, runner: Runner, budget: int, snapshot_tokens: int = 0):
        """`budget` in bytes; 0 keeps nothing. A snapshot is due every `snapshot_tokens` tokens; 0: never."""
        self.snapshot_tokens = snapshot_tokens
        self._grows = runner.token_capacity is not None
        self.cache = PrefixCache(budget, grows=runner.token_capacity is not None)
        self._runner = runner

    def recall(self, sequence: Sequence) -> None:
        """Give a sequence that was just admitted the longest beginning of its tokens that is known, and mark where its
        states are to be kept."""
        request = sequence.request
        if request.reads_only:
            request.miss = Miss.SCORED
            return
        ids = np.array(request.given, np.int64)
        most = len(ids) - 1  # the last one has to run: what comes next is sampled from it
        match = self.cache.match(self._key(sequence), ids, most)
        request.miss, known = match.miss, match.tokens
        restored: Restored | None = request.restored
        if restored is not None and restored.policy != repr(request.policy):
            restored = None  # of a turn under another policy: no part of this one's state, nor of its shape
            request.miss = request.miss and Miss.POLICY
        if restored is not None and restored.tokens > known:
            self._runner.load(sequence, [restored.saved])
            request.miss, known = Miss.NONE if restored.tokens == most else Miss.UNSEEN, restored.tokens
            sequence.tainted = restored.key != repr(self._key(sequence))
        elif match.node is not None:
            self._runner.load(sequence, self.cache.chain(match.node))
        request.restored = None
        sequence.prefilled = request.cached = sequence.snapshot_at = known
        if not self.cache.budget or request.resumed:  # others wait for what is resumed: one chunk, not two
            return
        marks = {m for m in range(STRIDE, most, STRIDE) if m > known}
        marks |= {m for m in (match.seen, most) if SHORTEST <= m <= most and m - known >= SHORTEST}
        sequence.marks = sorted(marks)

    def passed(self, sequence: Sequence) -> None:
        """A chunk of a sequence's prompt is through."""
        if sequence.prefilled in sequence.marks:
            self._keep(sequence, sequence.request.given[: sequence.prefilled])

    def ended(self, sequence: Sequence) -> StateAfter | None:
        """A sequence is complete: its last token has been sampled, and not been fed. The snapshot that its request
        asked for."""
        request = sequence.request
        ids = request.prompt + sequence.tokens[:-1]
        if not request.reads_only and len(ids) - request.cached >= SHORTEST:
            self._keep(sequence, ids)
        return self._snapshot(sequence) if request.keep else None

    def due(self, sequence: Sequence, *, always: bool = False) -> StateAfter | None:
        """A snapshot of a sequence whose last token has not been fed yet, if it is time for one."""
        # Of a state that grows all is written each time: it has to have doubled.
        wait = max(self.snapshot_tokens, sequence.snapshot_at if self._grows else 0)
        if always or (self.snapshot_tokens and sequence.length - sequence.snapshot_at >= wait):
            return self._snapshot(sequence)
        return None

    def read(self, request: Request) -> "Restored":
        """The snapshot that a request brought. Raises DataLossError or FailedPreconditionError."""
        saved, about = self._runner.parse(request.state)
        count = int(about["tokens"])
        if count >= len(request.given) or about["digest"] != _digest(request.given[:count]):
            raise FailedPreconditionError("snapshot: it is not of the tokens that the request begins with")
        return Restored(saved, count, str(about.get("policy", "")), str(about["key"]))

    def _snapshot(self, sequence: Sequence) -> StateAfter:
        count = sequence.length - 1
        sequence.snapshot_at = count + 1
        digest, policy = _digest_of(sequence, count), repr(sequence.request.policy)
        key = "" if sequence.tainted else repr(self._key(sequence))
        about = {"tokens": count, "digest": digest, "policy": policy, "key": key}
        return StateAfter(len(sequence.tokens), self._runner.export(sequence, about))

    def _keep(self, sequence: Sequence, ids: list[int]) -> None:
        if self.cache.budget and not sequence.tainted:
            key = self._key(sequence)
            self.cache.insert(key, np.array(ids, np.int64), lambda above: self._runner.save(sequence, above))

    def _key(self, sequence: Sequence) -> Hashable:
        """Whose state may stand for whose: that of the same depth policy, and of the same seed where the model itself
        draws at random."""
        return sequence.request.policy, sequence.seed if self._runner.draws else None


def _digest_of(sequence: Sequence, count: int) -> str:
    """`_digest` of so many tokens; those that were there at its last snapshot are not gone through again."""
    known, digest = sequence.digested or (0, _hash())
    prompt = sequence.request.prompt
    digest.update(
        _bytes(prompt[known:count] + sequence.tokens[max(0, known - len(prompt)) : count - len(prompt)])
    )
    sequence.digested = count, digest
    return digest.hexdigest()


def _digest(ids: list[int]) -> str:
    digest = _hash()
    digest.update(_bytes(ids))
    return digest.hexdigest()


def _hash() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=16)


def _bytes(ids: list[int]) -> bytes:
    return np.array(ids, np.int64).tobytes()
