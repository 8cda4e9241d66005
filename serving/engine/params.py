"""How a continuation is sampled. Validated where it is made; plain data inside."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serving.engine.depth import DepthPolicy
from serving.errors import InvalidArgumentError

MAX_N = 128
MAX_LOGPROBS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BIASES = 1024
GRAMMARS = ("json_schema", "regex", "lark")
MAX_GRAMMAR = 1 << 16


MAX_PRIORITY = 100
"""That a client may ask for; -100 is the least."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of a continuation has to look like. Raises InvalidArgumentError."""

    kind: str  # one of GRAMMARS
    text: str

    def __post_init__(self) -> None:
        if self.kind not in GRAMMARS:
            raise InvalidArgumentError("grammar.kind", self.kind, f"must be one of {', '.join(GRAMMARS)}")
        if not isinstance(self.text, str) or not 0 < len(self.text) <= MAX_GRAMMAR:
            limit = f"must have 1 to {MAX_GRAMMAR} characters"
            raise InvalidArgumentError("grammar", f"{len(str(self.text))} characters", limit)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The defaults sample from the model's own distribution.

    Raises InvalidArgumentError naming the field, its value and its limit.
    """

    n: int = 1  # continuations of the prompt
    max_tokens: int = 128
    min_tokens: int = 0  # before an end-of-text or stop token may end it
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # share of the likeliest token's probability
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: drawn
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # of each token, and of this many likeliest alternatives
    depth: DepthPolicy | str | None = None  # the model's default where None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.depth, str):
            object.__setattr__(self, "depth", DepthPolicy.parse(self.depth))
        if self.depth is not None and not isinstance(self.depth, DepthPolicy):
            raise InvalidArgumentError("depth", self.depth, "must be a DepthPolicy, or text like fixed(2)")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            name, value = ("min_tokens", self.min_tokens) if self.min_tokens else ("ignore_eos", True)
            raise InvalidArgumentError(
                name, value, "cannot be with a grammar, which says where the text ends"
            )
        _whole("n", self.n, 1, MAX_N)
        _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens, "max_tokens")
        _real("temperature", self.temperature, 0, 100)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _real("top_p", self.top_p, 0, 1, above=True)
        _real("min_p", self.min_p, 0, 1)
        _real("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _count("logit_bias", self.logit_bias, MAX_BIASES)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, 0, 2**31 - 1)
            _real(f"logit_bias[{token}]", bias, -100, 100)
        _count("stop", self.stop, MAX_STOPS)
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InvalidArgumentError(
                    "stop", text, f"must be a string of 1 to {MAX_STOP_LENGTH} characters"
                )
        _count("stop_token_ids", self.stop_token_ids, MAX_STOPS)
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, 2**31 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def policy(self) -> DepthPolicy | None:
        """The depth policy; text has been parsed by now."""
        assert not isinstance(self.depth, str)
        return self.depth

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocabulary(self, size: int) -> None:
        """Raises InvalidArgumentError for a token id that a model with `size` tokens does not have."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if token >= size:
                    raise InvalidArgumentError(name, token, f"token ids of this model are below {size}")


def _whole(name: str, value: object, low: int, high: int, high_name: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limit = f"{high_name} = {high}" if high_name else str(high)
        raise InvalidArgumentError(name, value, f"must be a whole number from {low} to {limit}")


def _real(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= float(value) <= high or (above and value == low):  # type: ignore[arg-type]
        start = f"above {low:g}" if above else f"from {low:g}"
        raise InvalidArgumentError(name, value, f"must be a number {start} to {high:g}")


def _count(name: str, values: Sequence[object] | Mapping[int, float], most: int) -> None:
    if len(values) > most:
        raise InvalidArgumentError(name, values, f"has {len(values)} entries, at most {most} are allowed")
