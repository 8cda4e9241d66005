"""Which file hosts which `model_type`. A new family is its file and a line here."""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import ConfigError

FAMILIES: Mapping[str, str] = {
    "gla": "models.mixers.gla",
}


class Family(Protocol):
    NAMES: tuple[tuple[str, str], ...]

    def build(self, raw: dict[str, Any], file: object) -> tuple[ModelConfig, Decoder]: ...


def family(raw: dict[str, Any], file: object) -> Family:
    """The module that hosts a parsed config.json. Raises ConfigError for a `model_type` that none does."""
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(file, "model_type", model_type, f"must be one of {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(FAMILIES[model_type])  # type: ignore[return-value]
