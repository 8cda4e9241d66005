"""Which file hosts which `model_type`. A new family is its file and a line here."""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import ConfigError

FAMILIES: Mapping[str, str] = {
    "gla": "models.mixers.gla",
    "gsa": "models.mixers.gsa",
    "hgrn2": "models.mixers.hgrn2",
    "linear_attn": "models.mixers.linear_attn",
    "llama": "models.mixers.llama",
    "mamba2": "models.mixers.mamba2",
    "retnet": "models.mixers.retnet",
    "rwkv6": "models.mixers.rwkv6",
    "xlstm": "models.mixers.xlstm",
}


class Family(Protocol):
    Config: type[ModelConfig]
    NAMES: tuple[tuple[str, str], ...]

    def build(self, raw: dict[str, Any], file: object) -> tuple[ModelConfig, Decoder]: ...


def family(raw: dict[str, Any], file: object) -> Family:
    """The module that hosts a parsed config.json. Raises ConfigError for a `model_type` that none does."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(file, "model_type", model_type, f"must be one of {', '.join(sorted(FAMILIES))}")
    return cast("Family", importlib.import_module(FAMILIES[model_type]))
