"""Recursive models over any family, in a format of our own (docs/depth.md): a configuration of that family with the
unique layers, and how they are looped.

    {"model_type": "recursive", "base": {"model_type": "gla", "num_hidden_layers": 4, ...},
     "sharing": "middle_cycle", "num_recursions": 3, "skipped": "absent", "lora_rank": 0, "untied": false,
     "exit_gate": false}

Relaxed Recursive Transformers, arXiv 2410.20672.
"""

from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from models.config import ModelConfig
from models.decoder import Decoder
from models.depth.base import checked, parts, plain_stack
from models.depth.looped import Loop, LoopedDecoder, Skipped
from models.depth.lora import relax
from models.errors import ConfigError
from models.mixers.attention import Attention
from models.registry import names as names_of


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["recursive"]
    base: dict[str, Any]
    sharing: Literal["cycle", "sequence", "middle_cycle", "middle_sequence"] = "cycle"
    num_recursions: int = pydantic.Field(gt=0, le=256)
    skipped: Skipped = "absent"
    lora_rank: int = pydantic.Field(0, ge=0)
    lora_alpha: float | None = pydantic.Field(
        None, gt=0
    )  # the update is scaled by alpha / rank; by 1 without
    untied: bool = False  # norms and biases of the core differ from depth to depth; only with a LoRA
    exit_gate: bool = False
    default_depth: str = "full"  # depth policy of requests that do not give one

    @property
    def outside(self) -> int:
        """Layers before the core, and as many after it."""
        return 1 if self.sharing.startswith("middle") else 0


def build(raw: dict[str, Any], file: object) -> tuple[ModelConfig, Decoder]:
    c = checked(Config, raw, file)
    base_config, base = plain_stack(c.base, file)
    check_loop(base, c.outside, c.sharing, c.skipped, file)
    loop = Loop(
        depths=c.num_recursions,
        prelude=c.outside,
        coda=c.outside,
        skipped=c.skipped,
        sequence="sequence" in c.sharing,
        gate=c.exit_gate,
    )
    model = LoopedDecoder(**parts(base), loop=loop)
    model.default_depth = c.default_depth
    if c.lora_rank:
        scale = c.lora_alpha / c.lora_rank if c.lora_alpha else 1.0
        for stage in model.cores:
            for i in model.stages[stage].layers:
                relax(model.blocks[i], c.num_recursions, c.lora_rank, scale, model.token_depths, c.untied)
    return base_config, model


def check_loop(base: Decoder, outside: int, sharing: str, skipped: Skipped, file: object) -> None:
    """Whether a plain stack can be looped like that, with `outside` layers before the core and as many after it.
    Raises ConfigError."""
    if len(base.layers) <= 2 * outside:
        raise ConfigError(file, "base.num_hidden_layers", len(base.layers), f"leaves no core for {sharing}")
    core = base.blocks[outside : len(base.layers) - outside]
    attends = all(
        isinstance(mixer, Attention) and mixer.window is None for block in core for mixer in block.mixers
    )
    if skipped == "shared" and not attends:
        raise ConfigError(
            file, "skipped", skipped, "only full attention can share its entries between depths"
        )
    if skipped == "last_exited" and "sequence" in sharing:
        raise ConfigError(
            file, "skipped", skipped, f"sharing = {sharing} has no last depth to take entries from"
        )


def names(raw: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Those of the base family."""
    return names_of(raw["base"], "base")


NAMES: tuple[tuple[str, str], ...] = ()  # see `names`
