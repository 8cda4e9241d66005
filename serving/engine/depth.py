"""How deep a token goes: the policies of requests, and the signals that they look at."""

import math
import re
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from serving.errors import InvalidArgumentError


class ExitReason(IntEnum):
    """Why a token left at the depth it did; the numbers are those of the wire."""

    FULL_DEPTH = 1
    FIXED_DEPTH = 2
    ROUTED = 3
    GATED = 4
    CONFIDENT = 5
    CONVERGED = 6
    GOVERNED = 7
    OUT_OF_TIME = 8


CONFIDENCE = ("probability", "margin", "entropy")
CONVERGENCE = ("latent_diff", "cosine", "kl", "entropy_diff", "argmax", "minp_kl")
ABOUT_PREDICTIONS = frozenset({*CONFIDENCE, "kl", "entropy_diff", "argmax", "minp_kl"})
SIGNALS = ("router", "gate", *CONFIDENCE, *CONVERGENCE)
AT_LEAST = frozenset({"router", "gate", "probability", "margin", "argmax"})
"""Signals by which a token leaves when they are at least the threshold; by the others, when they are at most."""

DEFAULT_THRESHOLDS = {
    "router": 0.5,
    "probability": 0.9,
    "margin": 0.8,
    "entropy": 0.5,
    # Huginn's exit criteria (facts: seal-rg/recurrent-pretraining)
    "latent_diff": 0.03,
    "cosine": 1e-3,
    "kl": 1e-3,
    "entropy_diff": 1e-3,
    "argmax": 5,
    "minp_kl": 1e-5,
}
KINDS = ("full", "fixed", "router", "gate", "confidence", "converged", "chain", "deadline")
_REASONS = {
    "fixed": ExitReason.FIXED_DEPTH,
    "router": ExitReason.ROUTED,
    "gate": ExitReason.GATED,
    "confidence": ExitReason.CONFIDENT,
    "converged": ExitReason.CONVERGED,
    "deadline": ExitReason.OUT_OF_TIME,
}
MAX_DEPTH = 1 << 16
MAX_CHAIN = 1024


@dataclass(frozen=True, slots=True)
class DepthPolicy:
    """What a request says about the depth of its tokens.

        DepthPolicy.full(), DepthPolicy.fixed(2), DepthPolicy.confidence("probability", 0.9), ...

    or the same as text, "confidence(probability, 0.9)". Raises InvalidArgumentError, naming the field.
    """

    kind: str | None = "full"  # None: the model's own, within the bounds below
    depth: int | None = None  # fixed
    measure: str | None = None  # confidence, converged
    threshold: float | None = None  # gate, confidence, converged; the model's or the usual one where None
    layers: tuple[int, ...] = ()  # chain
    min_depth: int | None = None
    max_depth: int | None = None
    width: float | None = None  # share of heads and hidden units, where a model is nested by width

    def __post_init__(self) -> None:
        if self.width is not None and not (isinstance(self.width, (int, float)) and 0 < self.width <= 1):
            raise InvalidArgumentError("depth.width", self.width, "must be a number above 0, at most 1")
        if self.kind is not None and self.kind not in KINDS:
            raise InvalidArgumentError("depth", self.kind, f"must be one of {', '.join(KINDS)}")
        for name, value in (
            ("fixed", self.depth),
            ("min_depth", self.min_depth),
            ("max_depth", self.max_depth),
        ):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_DEPTH
            ):
                raise InvalidArgumentError(
                    f"depth.{name}", value, f"must be a whole number from 0 to {MAX_DEPTH}"
                )
        if self.kind == "fixed" and not self.depth:
            raise InvalidArgumentError("depth.fixed", self.depth, "must be a whole number from 1")
        if self.min_depth is not None and self.max_depth is not None and self.min_depth > self.max_depth:
            raise InvalidArgumentError(
                "depth.min_depth", self.min_depth, f"is above max_depth = {self.max_depth}"
            )
        least, most = self.min_depth or 0, MAX_DEPTH if self.max_depth is None else self.max_depth
        if self.depth is not None and not least <= self.depth <= most:
            raise InvalidArgumentError(
                "depth.fixed", self.depth, f"must be from min_depth = {least} to max_depth = {most}"
            )
        known = {"confidence": CONFIDENCE, "converged": CONVERGENCE}.get(self.kind or "")
        if known is not None and self.measure not in known:
            raise InvalidArgumentError(
                f"depth.{self.kind}.measure", self.measure, f"must be one of {', '.join(known)}"
            )
        if self.threshold is not None and not self._possible(self.threshold):
            high = "1" if self.kind == "gate" or self.measure in ("probability", "margin") else "infinity"
            limit = f"must be a number from 0 to {high}"
            raise InvalidArgumentError(f"depth.{self.kind}.threshold", self.threshold, limit)
        if self.kind == "chain" and not 1 <= len(self.layers) <= MAX_CHAIN:
            raise InvalidArgumentError("depth.chain", self.layers, f"must name 1 to {MAX_CHAIN} layers")
        for layer in self.layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= MAX_DEPTH:
                limit = f"must name layers by whole numbers from 0 to {MAX_DEPTH}"
                raise InvalidArgumentError("depth.chain", layer, limit)

    def _possible(self, threshold: float) -> bool:
        if (
            isinstance(threshold, bool)
            or not isinstance(threshold, (int, float))
            or not math.isfinite(threshold)
        ):
            return False
        bounded = self.kind == "gate" or self.measure in ("probability", "margin")
        return 0 <= threshold <= (1 if bounded else math.inf)

    @property
    def signal(self) -> str | None:
        """What it looks at after each pass, if anything."""
        return self.kind if self.kind in ("router", "gate") else self.measure

    @property
    def reason(self) -> ExitReason:
        """Why a token that leaves by it left."""
        return _REASONS.get(self.kind or "", ExitReason.FULL_DEPTH)

    def over(self, default: "DepthPolicy") -> "DepthPolicy":
        """This policy, with the default's in place of what it leaves open."""
        if self.kind is not None:
            same = (self.kind, self.measure) == (default.kind, default.measure)
            return replace(self, threshold=default.threshold) if same and self.threshold is None else self
        given: dict[str, Any] = {name: getattr(self, name) for name in ("min_depth", "max_depth", "width")}
        given = {name: value for name, value in given.items() if value is not None}
        if default.depth is not None:
            low, high = given.get("min_depth", 0), given.get("max_depth", MAX_DEPTH)
            given["depth"] = max(1, low, min(default.depth, high))
        return replace(default, **given)

    @staticmethod
    def full(**bounds: Any) -> "DepthPolicy":
        """Every token to the full depth."""
        return DepthPolicy("full", **bounds)

    @staticmethod
    def fixed(depth: int, **bounds: Any) -> "DepthPolicy":
        """Every token to this depth: so many loops, or the sub-model of that number."""
        return DepthPolicy("fixed", depth=depth, **bounds)

    @staticmethod
    def router(**bounds: Any) -> "DepthPolicy":
        """The model's own router."""
        return DepthPolicy("router", **bounds)

    @staticmethod
    def gate(threshold: float | None = None, **bounds: Any) -> "DepthPolicy":
        """The model's own exit gate: leave when its cumulative probability reaches the threshold."""
        return DepthPolicy("gate", threshold=threshold, **bounds)

    @staticmethod
    def confidence(
        measure: str = "probability", threshold: float | None = None, **bounds: Any
    ) -> "DepthPolicy":
        """Leave when the intermediate prediction is sure: probability, margin or entropy (nats)."""
        return DepthPolicy("confidence", measure=measure, threshold=threshold, **bounds)

    @staticmethod
    def converged(
        measure: str = "latent_diff", threshold: float | None = None, **bounds: Any
    ) -> "DepthPolicy":
        """Leave when another pass changes little: latent_diff, cosine, kl, entropy_diff, argmax or minp_kl."""
        return DepthPolicy("converged", measure=measure, threshold=threshold, **bounds)

    @staticmethod
    def chain(layers: "list[int] | tuple[int, ...]") -> "DepthPolicy":
        """These layers, in this order, with skips and repeats."""
        return DepthPolicy("chain", layers=tuple(layers))

    @staticmethod
    def deadline(**bounds: Any) -> "DepthPolicy":
        """As deep as the request's timeout allows."""
        return DepthPolicy("deadline", **bounds)

    @staticmethod
    def parse(text: str) -> "DepthPolicy":
        """From ``full``, ``fixed(2)``, ``gate(0.8)``, ``confidence(entropy, 0.3)``, ``chain(0, 1, 1)``, ..., each with
        ``min=1``, ``max=3`` and ``width=0.5`` among its arguments if wanted."""
        match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\)|[=:](.*))?\s*", text, re.DOTALL)
        if match is None:
            raise InvalidArgumentError(
                "depth", text, "must look like full, fixed(2) or confidence(entropy, 0.3)"
            )
        kind = match[1]
        words = [word.strip() for word in (match[2] or match[3] or "").split(",") if word.strip()]
        fields: dict[str, Any] = {}
        for word in [w for w in words if w.startswith(("min=", "max=", "width="))]:
            name, _, value = word.partition("=")
            field = "width" if name == "width" else f"{name}_depth"
            if field in fields:
                raise InvalidArgumentError("depth", text, f"{name} is there twice")
            fields[field] = _number(text, value, float if name == "width" else int)
            words.remove(word)
        if kind == "chain":
            return DepthPolicy(kind, layers=tuple(_number(text, word, int) for word in words), **fields)
        names = {"fixed": ("depth",), "gate": ("threshold",), "confidence": ("measure", "threshold")}
        names["converged"] = names["confidence"]
        if len(words) > len(names.get(kind, ())):
            raise InvalidArgumentError("depth", text, f"{kind} takes {len(names.get(kind, ()))} arguments")
        for name, word in zip(names.get(kind, ()), words, strict=False):
            fields[name] = (
                word if name == "measure" else _number(text, word, int if name == "depth" else float)
            )
        if kind in ("confidence", "converged"):
            fields.setdefault("measure", "probability" if kind == "confidence" else "latent_diff")
        return DepthPolicy(kind, **fields)


def _number(text: str, word: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise InvalidArgumentError("depth", text, f"{word!r} is not a number") from None
