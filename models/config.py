"""What the configurations of all families have in common."""

from collections.abc import Collection
from typing import Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, ConfigDict, model_validator

from models.errors import ConfigError

COMMON = frozenset(
    {
        "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label",
        "initializer_range", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
        "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
        "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Keys of every configuration that the transformers library writes; none changes what is computed here."""


def one_of(name: str, known: Collection[str]) -> str:
    """For validators: the name itself. Raises ValueError for one that is not known."""
    if name not in known:
        raise ValueError(f"must be one of {', '.join(sorted(known))}")
    return name


def _problem(file: object, details: dict[str, Any]) -> ConfigError:
    """Of one entry of pydantic's list of errors."""
    field = ".".join(str(part) for part in details["loc"])
    value = None if details["type"] == "missing" else details["input"]
    return ConfigError(file, field, value, details["msg"].removeprefix("Value error, "))


class ModelConfig(BaseModel):
    """A `config.json`, validated.

    A family lists the keys that it understands, with the defaults of its format; a key whose only supported
    value is the usual one is typed as that literal, so that a checkpoint asking for something else is refused
    by name. Keys of the format that change nothing of what is computed here stand in `inert`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    vocab_size: int = pydantic.Field(gt=0)
    hidden_size: int = pydantic.Field(gt=0)
    num_hidden_layers: int = pydantic.Field(gt=0)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    max_position_embeddings: int | None = None  # longest sequence in training; binds full attention only

    aliases: ClassVar[dict[str, str]] = {}  # a format's own name for a key -> the name used here
    inert: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _apply_aliases(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {cls.aliases.get(key, key): value for key, value in raw.items()}

    @classmethod
    def unknown(cls, raw: dict[str, Any]) -> list[str]:
        """Keys of a parsed config.json that this family neither reads nor knows to mean nothing here."""
        known = {*cls.model_fields, *cls.aliases, *COMMON}
        for ancestor in cls.__mro__:
            known |= ancestor.__dict__.get("inert", frozenset())
        return sorted(raw.keys() - known)

    @classmethod
    def read(cls, raw: dict[str, Any], file: object) -> Self:
        """Validate a parsed config.json. Raises ConfigError naming the file, the field, its value and what it
        may be."""
        for problem in cls.problems(raw, file):
            raise problem
        return cls.model_validate(raw)

    @classmethod
    def problems(cls, raw: dict[str, Any], file: object) -> list[ConfigError]:
        """Everything that is wrong with a parsed config.json."""
        try:
            cls.model_validate(raw)
        except pydantic.ValidationError as error:
            return [_problem(file, dict(details)) for details in error.errors()]
        return []

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
