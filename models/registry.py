"""Which file hosts which `model_type`. A new family is its file and a line here."""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch

from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import ConfigError

FAMILIES: Mapping[str, str] = {
    "MoRLlamaForCausalLM": "models.depth.mor",
    "aaren": "models.mixers.aaren",
    "delta_net": "models.mixers.delta_net",
    "elman": "models.mixers.cells",
    "falcon_mamba": "models.mixers.falcon_mamba",
    "flashrnn": "models.mixers.flashrnn",
    "fsmn": "models.mixers.fsmn",
    "gated_deltanet": "models.mixers.gated_deltanet",
    "gla": "models.mixers.gla",
    "gru": "models.mixers.cells",
    "gsa": "models.mixers.gsa",
    "hgrn": "models.mixers.hgrn",
    "hgrn2": "models.mixers.hgrn2",
    "huginn_raven": "models.depth.huginn",
    "kda": "models.mixers.kda",
    "linear_attn": "models.mixers.linear_attn",
    "llama": "models.mixers.llama",
    "lru": "models.mixers.lru",
    "lstm": "models.mixers.cells",
    "mamba": "models.mixers.mamba",
    "mamba2": "models.mixers.mamba2",
    "multiresconv": "models.mixers.multiresconv",
    "olmo_hybrid": "models.mixers.olmo_hybrid",
    "ouro": "models.depth.ouro",
    "plstm": "models.mixers.plstm",
    "qwen3_next": "models.mixers.qwen3_next",
    "recurrent_gemma": "models.mixers.recurrent_gemma",
    "recursive": "models.depth.recursive",
    "retnet": "models.mixers.retnet",
    "routed": "models.depth.routed",
    "rwkv": "models.mixers.rwkv4",
    "rwkv6": "models.mixers.rwkv6",
    "rwkv7": "models.mixers.rwkv7",
    "s4d": "models.mixers.s4d",
    "samba": "models.mixers.samba",
    "slstm": "models.mixers.flashrnn",
    "sorted": "models.depth.sorted",
    "srwm": "models.mixers.srwm",
    "tcnca": "models.mixers.tcnca",
    "transformer": "models.mixers.transformer",
    "xlstm": "models.mixers.xlstm",
}


class Family(Protocol):
    NAMES: tuple[tuple[str, str], ...]

    def build(self, raw: dict[str, Any], file: object) -> tuple[ModelConfig, Decoder]: ...


def family(raw: dict[str, Any], file: object) -> Family:
    """The module that hosts a parsed config.json. Raises ConfigError for a `model_type` that none does."""
    architectures = raw.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = first if isinstance(first, str) and first in FAMILIES else raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(file, "model_type", model_type, f"must be one of {', '.join(sorted(FAMILIES))}")
    return cast("Family", importlib.import_module(FAMILIES[model_type]))


def build(raw: dict[str, Any], file: object) -> tuple[ModelConfig, Decoder]:
    """The model of a configuration, its weights still without memory. Raises ConfigError, also where a tensor would
    have more bytes than can be counted."""
    host = family(raw, file)
    try:
        with torch.device("meta"):
            return host.build(raw, file)
    except (OverflowError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(file, "", None, f"describes no model that can be built: {reason}") from error


def names(raw: dict[str, Any], file: object) -> tuple[tuple[str, str], ...]:
    """Our names -> the checkpoint's: substitutions, applied in order to the name of each parameter. A family
    that is built on another one has a function `names` of the configuration in place of the constant."""
    host = family(raw, file)
    derived = getattr(host, "names", None)
    return host.NAMES if derived is None else cast("tuple[tuple[str, str], ...]", derived(raw))
