"""The path that a depth policy takes through a model, or why there is none."""

from dataclasses import replace

from models.decoder import Decoder
from models.paths import NOWHERE, Path
from serving.engine.depth import DepthPolicy
from serving.errors import InvalidArgumentError


def path_of(model: Decoder, policy: DepthPolicy) -> Path:
    """Raises InvalidArgumentError, naming the field, where the model cannot do what the policy asks for."""
    path, asked = _path(model, policy), policy.width
    if asked is None or asked == 1:
        return path
    if model.widths == (1.0,):
        raise InvalidArgumentError("depth.width", asked, "this model is not nested by width")
    width = min(model.widths, key=lambda w: abs(w - asked))
    if abs(width - asked) > 1e-6:
        shown = ", ".join(f"{w:g}" for w in model.widths)
        raise InvalidArgumentError("depth.width", asked, f"must be one of {shown}")
    return replace(path, width=width)


def _path(model: Decoder, policy: DepthPolicy) -> Path:
    path = _chain(model, policy.layers) if policy.kind == "chain" else model.path()
    exits = any(node.exit_to != NOWHERE for node in path.nodes)
    if policy.kind not in ("full", "fixed", "chain") and not exits:
        raise InvalidArgumentError("depth", policy.kind, "every token of this model takes all of its layers")
    if policy.signal in ("router", "gate") and policy.signal not in model.signals:
        raise InvalidArgumentError("depth", policy.kind, f"this model has no {policy.signal}")
    for name, depth in (
        ("fixed", policy.depth),
        ("min_depth", policy.min_depth),
        ("max_depth", policy.max_depth),
    ):
        if depth is not None and depth > path.full_depth:
            whose = "chain" if policy.kind == "chain" else "model"
            limit = f"the full depth of this {whose} is {path.full_depth}"
            raise InvalidArgumentError(f"depth.{name}", depth, limit)
    shown = ", ".join(map(str, path.exits))
    if policy.depth is not None and policy.depth not in path.exits:
        raise InvalidArgumentError("depth.fixed", policy.depth, f"must be one of {shown}")
    low, high = policy.min_depth or 0, policy.max_depth
    if high is not None and not any(low <= depth <= high for depth in path.exits):
        limit = f"no token can leave at a depth from {low} to this one, only at {shown}"
        raise InvalidArgumentError("depth.max_depth", high, limit)
    return path


def _chain(model: Decoder, layers: tuple[int, ...]) -> Path:
    count = len(model.layers)
    if not model.chains:
        raise InvalidArgumentError("depth.chain", layers, "the layers of this model stay in their order")
    for layer in layers:
        if not 0 <= layer < count:
            raise InvalidArgumentError("depth.chain", layer, f"the layers of this model are 0 to {count - 1}")
    return model.chain(layers)
