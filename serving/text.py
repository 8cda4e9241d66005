"""Between token ids and text: incremental, safe for UTF-8, with stop strings that never leak a part of themselves."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns one sequence's tokens into text as they come. A character that spans tokens comes out whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0  # characters given out

    def feed(self, token: int) -> str:
        self._ids.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._length += len(text)
        return text

    def flush(self) -> str:
        """What is left at the end: an unfinished character, as the replacement character."""
        rest = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._length :]
        self._length += len(rest)
        return rest


class StopMatcher:
    """Holds back what may become a stop string, and ends the text before the first one that does."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What may be given out now."""
        if not self._stops or self.matched is not None:
            return "" if self.matched is not None else text
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda match: (match[0], -len(match[1])))
            return self._held[:at]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back for nothing."""
        out = "" if self.matched is not None else self._held
        self._held = ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """The text of one continuation: `Detokenizer` and `StopMatcher` together."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], endings: frozenset[int]):
        """Tokens in `endings` end the text and are not part of it."""
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        self._matcher = StopMatcher(stops)
        self._endings = endings
        self.tokens = 0  # that belong to the continuation

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._matcher.matched is not None

    def feed(self, ids: Sequence[int], last: bool) -> tuple[list[str], str]:
        """The text that may be given out with each of these tokens that belong to the continuation (fewer than there
        are when a stop string ends it), and what comes after them when `last`: no more will come, so nothing is held
        back."""
        parts, rest = self._feed(ids, last)
        self.tokens += len(parts)
        return parts, rest

    def _feed(self, ids: Sequence[int], last: bool) -> tuple[list[str], str]:
        parts: list[str] = []
        if self._detokenizer is None:
            return [""] * len(ids), ""
        for number, token in enumerate(ids, 1):
            ends = last and number == len(ids) and token in self._endings
            parts.append("" if ends else self._matcher.feed(self._detokenizer.feed(token)))
            if self.stopped:
                return parts, ""
        rest = ""
        if last:
            rest = self._matcher.feed(self._detokenizer.flush())
            rest += self._matcher.flush()
        return parts, rest
