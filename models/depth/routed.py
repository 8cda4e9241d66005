"""Mixture-of-Recursions over any family, in a format of our own (docs/depth.md): a configuration of that family with
the unique layers, how they are looped, and the section `mor` of the released code's YAML.

    {"model_type": "routed", "base": {"model_type": "gla", "num_hidden_layers": 4, ...}, "sharing": "middle_cycle",
     "num_recursions": 3, "skipped": "absent",
     "mor": {"type": "expert", "capacity": "1,0.67,0.33", "expert": {"sampling": "aux_loss", "gating": "residual"}}}

The recursions share their weights. Over a constant-state family a token that skips a recursion leaves no trace in its
state, as it leaves no entry in its cache over attention (arXiv 2507.10524, section 2.2).
"""

from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from models.config import ModelConfig
from models.decoder import Decoder
from models.depth.base import checked, parts, plain_stack
from models.depth.looped import Loop
from models.depth.mor import KINDS, Mor
from models.depth.recursive import check_loop
from models.registry import names as names_of


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["routed"]
    base: dict[str, Any]
    sharing: Literal["cycle", "middle_cycle"] = "middle_cycle"
    num_recursions: int = pydantic.Field(gt=0, le=64)
    skipped: Literal["absent", "shared", "last_exited"] = "absent"
    mor: Mor


def build(raw: dict[str, Any], file: object) -> tuple[ModelConfig, Decoder]:
    c = checked(Config, raw, file)
    base_config, base = plain_stack(c.base, file)
    outside = 1 if c.sharing == "middle_cycle" else 0
    check_loop(base, outside, c.sharing, c.skipped, file)
    c.mor.check(c.num_recursions, c.skipped, file)
    loop = Loop(c.num_recursions, prelude=outside, coda=outside, skipped=c.skipped)
    return base_config, KINDS[c.mor.type](parts(base), loop, c.mor)


def names(raw: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Those of the base family."""
    return names_of(raw["base"], "base")


NAMES: tuple[tuple[str, str], ...] = ()  # see `names`
