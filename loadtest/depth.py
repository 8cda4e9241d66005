"""Mixtures of depth policies, as the command line writes them: ``full:0.5``, ``fixed=2:0.5``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadtest.core import Depth, Model
from loadtest.errors import FlagError

FORM = "must be POLICY[:WEIGHT], POLICY one of full, router, deadline, fixed=N, gate[=T], chain=0-1-2, "
FORM += "confidence[=MEASURE[,T]], converged[=MEASURE[,T]]"
MEASURES = {
    "confidence": ("probability", "margin", "entropy"),
    "converged": ("latent_diff", "cosine", "kl", "entropy_diff", "argmax", "minp_kl"),
}


@dataclass(frozen=True, slots=True)
class Mixture:
    """Policies, and the share of requests that each is sent with."""

    depths: tuple[Depth, ...]
    shares: tuple[float, ...]


def parse(items: Sequence[str], min_depth: int | None = None, max_depth: int | None = None) -> Mixture | None:
    """None where nothing is asked: the model's own default. Raises FlagError."""
    if not items:
        if min_depth is not None or max_depth is not None:
            flag, value = ("--min-depth", min_depth) if min_depth is not None else ("--max-depth", max_depth)
            raise FlagError(flag, value, "needs --depth, whose policy it bounds")
        return None
    depths, weights = [], []
    for item in items:
        label, _, weight = item.partition(":")
        try:
            weights.append(float(weight or 1))
            depths.append(replace(_policy(label), min_depth=min_depth, max_depth=max_depth))
        except ValueError:
            raise FlagError("--depth", item, FORM) from None
        if not 0 < weights[-1] < float("inf"):
            raise FlagError("--depth", item, "its weight must be > 0")
    total = sum(weights)
    return Mixture(tuple(depths), tuple(w / total for w in weights))


def _policy(label: str) -> Depth:
    policy, _, rest = label.partition("=")
    if policy in ("full", "router", "deadline") and not rest:
        return Depth(label, policy)
    if policy == "fixed":
        if (depth := int(rest)) < 1:
            raise ValueError
        return Depth(label, policy, depth=depth)
    if policy == "gate":
        return Depth(label, policy, threshold=float(rest) if rest else None)
    if policy == "chain":
        return Depth(label, policy, layers=tuple(int(layer) for layer in rest.split("-")))
    if policy in MEASURES:
        measure, _, threshold = rest.partition(",")
        if measure not in ("", *MEASURES[policy]):
            raise ValueError
        return Depth(label, policy, measure=measure, threshold=float(threshold) if threshold else None)
    raise ValueError


def check(mixture: Mixture | None, model: Model) -> None:
    """Hold the mixture against what the model says that it can do. Raises FlagError."""
    for depth in mixture.depths if mixture else ():
        if model.depth_policies and depth.policy not in model.depth_policies:
            raise FlagError("--depth", depth.label, f"{model.name} follows {', '.join(model.depth_policies)}")
        if model.max_depth and depth.depth > model.max_depth:
            raise FlagError(
                "--depth", depth.label, f"must be at most {model.max_depth}, the depth of {model.name}"
            )
