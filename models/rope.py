"""Rotary positions in the configurations of transformers."""

from collections.abc import Callable
from typing import Any, Literal

import pydantic


class RopeParameters(pydantic.BaseModel):
    """How positions become angles. Scaled variants are not supported."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore")

    rope_type: Literal["default"] = "default"
    rope_theta: float = pydantic.Field(default=10000.0, gt=0)
    partial_rotary_factor: float = pydantic.Field(default=1.0, gt=0, le=1)

    def width(self, dim: int) -> int:
        """Channels of a head of `dim` that are turned. Raises ValueError where they cannot be paired."""
        width = int(dim * self.partial_rotary_factor)
        if width % 2 or not width:
            raise ValueError(f"{width} of a head's {dim} channels are rotary: must be even")
        return width


def with_rope(partial: float = 1.0, theta: float = 10000.0) -> Callable[[Any], Any]:
    """For validators that run first: `rope_parameters`, gathered from the keys that configurations before
    transformers 5 have in their place (`rope_theta`, `rope_scaling`, `partial_rotary_factor`), with a
    family's defaults."""

    def gather(raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        given, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
        if not isinstance(given, dict) or not isinstance(scaling, dict):
            return raw
        given = dict(given)
        given.setdefault("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
        for name, default in (("rope_theta", theta), ("partial_rotary_factor", partial)):
            if given.get(name) is None:
                given[name] = raw[name] if raw.get(name) is not None else default
        return {**raw, "rope_parameters": given}

    return gather
