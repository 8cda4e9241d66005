"""What the configurations of all families have in common."""

from typing import Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, ConfigDict, model_validator

from models.errors import ConfigError


class ModelConfig(BaseModel):
    """A `config.json`, validated. A family lists the keys that it understands; a key whose only supported value is
    the usual one is typed as that literal, so that a checkpoint asking for something else is refused by name."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: int = pydantic.Field(gt=0)
    hidden_size: int = pydantic.Field(gt=0)
    num_hidden_layers: int = pydantic.Field(gt=0)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    aliases: ClassVar[dict[str, str]] = {}  # a format's own name for a key -> the name used here

    @model_validator(mode="before")
    @classmethod
    def _apply_aliases(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {cls.aliases.get(key, key): value for key, value in raw.items()}

    @classmethod
    def read(cls, raw: dict[str, Any], file: object) -> Self:
        """Validate a parsed config.json. Raises ConfigError naming the file, the field, its value and what it may be."""
        try:
            return cls.model_validate(raw)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "configuration"
            value = None if first["type"] == "missing" else first["input"]
            raise ConfigError(file, field, value, first["msg"]) from None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
