"""Sorted models over any family, in a format of our own (docs/depth.md): a configuration of that family, and the layers
after which a token may leave.

    {"model_type": "sorted", "base": {"model_type": "gla", "num_hidden_layers": 4, ...}, "exits": [2, 3, 4],
     "skipped": "propagate"}

SortedNet (arXiv 2309.00255), Sorted LLaMA (arXiv 2309.08968); for a llama that is nested by width as well, see
models.mixers.llama.
"""

from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from models.config import ModelConfig
from models.decoder import Decoder
from models.depth.base import checked, parts, plain_stack
from models.depth.nested import NestedDecoder
from models.errors import ConfigError
from models.registry import names as names_of


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["sorted"]
    base: dict[str, Any]
    exits: tuple[int, ...] = pydantic.Field(min_length=1)  # the last layer is one always
    skipped: Literal["absent", "propagate"] = "propagate"  # what later tokens see at skipped layers
    default_depth: str = "full"  # depth policy of requests that do not give one


def build(raw: dict[str, Any], file: object) -> tuple[ModelConfig, Decoder]:
    c = checked(Config, raw, file)
    base_config, base = plain_stack(c.base, file)
    count = len(base.layers)
    if not all(0 < e <= count for e in c.exits) or list(c.exits) != sorted(set(c.exits)):
        raise ConfigError(
            file, "exits", list(c.exits), f"must rise, from 1 to the {count} layers of the base"
        )
    model = NestedDecoder(**parts(base), exits=c.exits, fills=c.skipped == "propagate")
    model.default_depth = c.default_depth
    return base_config, model


def names(raw: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Those of the base family."""
    return names_of(raw["base"], "base")


NAMES: tuple[tuple[str, str], ...] = ()  # see `names`
