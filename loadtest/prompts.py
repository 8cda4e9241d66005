"""What is asked: text or token ids, different for every request, so that no cache flatters the server unless
it is meant to."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loadtest.errors import FlagError

SNIPPETS = (
    "The lighthouse keeper counted the ships each evening, and that night one more came back than had left. ",
    "def moving_average(values, window):\n    total = sum(values[:window])\n    ",
    "Question: a tank holds 240 litres and loses 7 litres an hour. When is it half empty?\nAnswer: ",
    "import json\n\n\ndef read_settings(path):\n    with open(path) as file:\n        ",
    "Dear Ms Okafor, thank you for your letter of the third of May. We have looked into the matter, and ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ",
    "Rivers that rise in the same hills may end in different seas, because ",
    "SELECT customer, SUM(amount) FROM orders WHERE ",
)
# Words that most vocabularies hold as one token, so that N of them are about N tokens.
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "no",
    "more",
    "if",
    "out",
    "so",
    "up",
    "said",
    "what",
    "its",
    "about",
    "than",
    "into",
    "them",
    "can",
    "only",
    "other",
    "time",
    "new",
    "some",
    "could",
    "these",
    "two",
    "may",
    "first",
    "then",
    "do",
    "any",
    "like",
    "my",
    "now",
    "over",
    "such",
    "our",
    "man",
    "me",
    "even",
    "most",
    "made",
    "after",
    "also",
    "well",
    "many",
    "before",
    "must",
    "through",
    "years",
    "where",
    "much",
    "your",
    "way",
    "down",
    "should",
    "because",
    "long",
    "each",
]
_POOL = 1 << 18  # random tokens that prompts are cut from
_UNIQUE = 8  # tokens at the start of a prompt, or after what is shared, that are drawn anew


class TextPrompts:
    """Given texts in turn; or the built-in ones, each with a number of its own in front; or words, about one
    a token."""

    def __init__(self, texts: Sequence[str], rng: np.random.Generator):
        self._texts = texts
        self._rng = rng
        self._taken = 0
        self._pool = [WORDS[i] for i in rng.integers(len(WORDS), size=1 << 14)]

    def next(self) -> str:
        self._taken += 1
        if self._texts:
            return self._texts[(self._taken - 1) % len(self._texts)]
        return f"# {self._rng.integers(1 << 32):08x}\n{SNIPPETS[self._taken % len(SNIPPETS)]}"

    def of_length(self, length: int) -> str:
        """About `length` tokens."""
        start = int(self._rng.integers(len(self._pool)))
        words = [WORDS[i] for i in self._rng.integers(len(WORDS), size=min(length, _UNIQUE))]
        while len(words) < length:
            words += self._pool[start : start + length - len(words)]
            start = 0
        return " ".join(words)


class TokenPrompts:
    """Random token ids, without those that end a text."""

    def __init__(self, vocab_size: int, avoid: Sequence[int], shared: int, rng: np.random.Generator):
        self._allowed = np.setdiff1d(np.arange(vocab_size), np.asarray(avoid, dtype=np.int64))
        if not len(self._allowed):
            raise FlagError(
                "--vocab-size", vocab_size, f"leaves nothing beside the end-of-text tokens {list(avoid)}"
            )
        self._rng = rng
        self._pool = rng.choice(self._allowed, _POOL)
        self._shared = rng.choice(self._allowed, shared).tolist()

    def of_length(self, length: int) -> list[int]:
        head = self._rng.choice(self._allowed, _UNIQUE).tolist()
        rest = max(0, length - len(self._shared) - _UNIQUE)
        return (self._shared + head + self._cut(int(self._rng.integers(_POOL)), rest))[:length]

    def of_blocks(self, length: int, blocks: Sequence[int], size: int) -> list[int]:
        """A prompt of named blocks of `size` tokens: the same name gives the same tokens."""
        tokens: list[int] = []
        for block in blocks:
            # Knuth's multiplicative hash spreads the names over the pool.
            tokens += self._cut(block * 2_654_435_761 % _POOL, size)
        return (tokens + self.of_length(max(0, length - len(tokens))))[:length]

    def _cut(self, start: int, length: int) -> list[int]:
        if start + length <= _POOL:
            cut: list[int] = self._pool[start : start + length].tolist()
            return cut
        return self._pool[np.arange(start, start + length) % _POOL].tolist()


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line: a JSON string, an object with a `prompt`, or the line itself. Raises FlagError."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise FlagError("--prompt-file", path, f"cannot be read: {reason}") from None
    if not lines:
        raise FlagError("--prompt-file", path, "has no prompts")
    return tuple(_prompt(path, number, line) for number, line in enumerate(lines, 1))


def _prompt(path: Path, number: int, line: str) -> str:
    if not line.startswith(('"', "{")):
        return line
    try:
        value = json.loads(line)
    except ValueError:
        return line
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise FlagError("--prompt-file", path, f"line {number}: an object must have a string `prompt`")
    return prompt
