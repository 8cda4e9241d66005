"""The plain stack of any family that a model of adaptive depth is made of."""

from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel

from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import ConfigError
from models.registry import family

Kind = TypeVar("Kind", bound=BaseModel)


def checked(kind: type[Kind], raw: dict[str, Any], file: object) -> Kind:
    """A configuration of its kind. Raises ConfigError with the first field that is wrong."""
    try:
        return kind.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(file, ".".join(map(str, first["loc"])), first.get("input"), first["msg"]) from None


def plain_stack(raw: dict[str, Any], file: object) -> tuple[ModelConfig, Decoder]:
    """The decoder of the configuration under `base`. Raises ConfigError where that is not a plain stack."""
    config, base = family(raw, file).build(raw, file)
    if type(base) is not Decoder:
        raise ConfigError(file, "base.model_type", raw.get("model_type"), "must be a plain stack of layers")
    return config, base


def parts(base: Decoder) -> dict[str, Any]:
    """What another decoder over the same layers is built with."""
    return {
        "embeddings": base.embeddings,
        "layers": list(base.layers),
        "norm": base.norm,
        "lm_head": base.lm_head,
        "embedding_scale": base.embedding_scale,
        "logit_softcap": base.logit_softcap,
        "residual_in_fp32": base.residual_in_fp32,
    }
