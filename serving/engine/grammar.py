"""Structured output: which tokens a grammar allows next. The library behind it is llguidance."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.engine.params import Grammar
from serving.errors import FailedPreconditionError, InvalidArgumentError


class Matcher:
    """Where one continuation is in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> "Matcher":
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[vocab_size]: the tokens that may come next; only end-of-text where the text is complete, or where
        the library gave up on a grammar that had become too much for it."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(mask, count=self._vocab_size, bitorder="little").astype(bool)

    def take(self, token: int) -> None:
        """Go on past a token that was allowed."""
        self._matcher.consume_token(token)


class Grammars:
    """Compiles grammars for the vocabulary of one model. Any thread may."""

    def __init__(self, tokenizer: str | None, vocab_size: int):
        """`tokenizer`: its tokenizer.json; None where the model has none, and so cannot follow a grammar."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: Any = None
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar, endings: Sequence[int]) -> Matcher:
        """At the beginning of a text. `endings`: the tokens that end one. Takes about a millisecond, up to a
        second the first time. Raises InvalidArgumentError for a grammar with a fault, FailedPreconditionError
        where the model cannot follow any."""
        from llguidance import LLMatcher

        if not endings:
            raise FailedPreconditionError(
                "grammar: this model has no end-of-text token, so its texts have no end"
            )
        matcher = LLMatcher(self._compiled(endings), _source(grammar), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip()
            raise InvalidArgumentError(
                f"grammar = {grammar.text[:80]!r}: not a usable {grammar.kind}: {reason[:400]}"
            )
        return Matcher(matcher, self._vocab_size)

    def _compiled(self, endings: Sequence[int]) -> Any:
        """The vocabulary as the library wants it; made once."""
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            raise FailedPreconditionError("grammar: this model has no tokenizer, so its tokens have no text")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = LLTokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=list(endings)
                )
            return self._vocabulary


def _source(grammar: Grammar) -> str:
    """In the library's own terms."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        schema = json.loads(grammar.text)
    except ValueError as error:
        raise InvalidArgumentError(f"grammar = {grammar.text[:80]!r}: not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidArgumentError("grammar", grammar.text, "a JSON schema must be an object")
    return LLMatcher.grammar_from_json_schema(schema)
