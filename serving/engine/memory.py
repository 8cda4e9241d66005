"""What an engine remembers of the prompts that it has seen: when to keep a state, and when to take one up again."""

from collections.abc import Hashable

import numpy as np

from serving.engine.backend import Runner
from serving.engine.core import Sequence
from serving.engine.prefix import SHORTEST, Miss, PrefixCache

STRIDE = 1024
"""Tokens of a long prompt after which a state is kept at the latest."""


class Memory:
    """The prefix cache of one model. States are kept at the end of a prompt and of a continuation, where a prompt parts
    from what was seen before, and every STRIDE tokens."""

    def __init__(self, runner: Runner, budget: int):
        """`budget` in bytes; 0 keeps nothing."""
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
        request.miss = match.miss
        if match.node is not None:
            self._runner.load(sequence, self.cache.chain(match.node))
            sequence.prefilled = request.cached = match.tokens
        if not self.cache.budget:
            return
        marks = {m for m in range(STRIDE, most, STRIDE) if m > match.tokens}
        marks |= {m for m in (match.seen, most) if SHORTEST <= m <= most and m - match.tokens >= SHORTEST}
        sequence.marks = sorted(marks)

    def passed(self, sequence: Sequence) -> None:
        """A chunk of a sequence's prompt is through."""
        if sequence.prefilled in sequence.marks:
            self._keep(sequence, sequence.request.given[: sequence.prefilled])

    def ended(self, sequence: Sequence) -> None:
        """A sequence is complete: its last token has been sampled, and not been fed."""
        request = sequence.request
        ids = request.prompt + sequence.tokens[:-1]
        if not request.reads_only and len(ids) - request.cached >= SHORTEST:
            self._keep(sequence, ids)

    def _keep(self, sequence: Sequence, ids: list[int]) -> None:
        if self.cache.budget and not sequence.tainted:
            key = self._key(sequence)
            self.cache.insert(key, np.array(ids, np.int64), lambda above: self._runner.save(sequence, above))

    def _key(self, sequence: Sequence) -> Hashable:
        """Whose state may stand for whose: that of the same depth policy, and of the same seed where the model itself
        draws at random."""
        return sequence.request.policy, sequence.seed if self._runner.draws else None
