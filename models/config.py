"""What the configurations of all families have in common."""

from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Self

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


Layers = Annotated[int, pydantic.Field(gt=0, le=1_000)]
Epsilon = Annotated[float, pydantic.Field(ge=0)]


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """As a configuration may give them: one, several, or none, for which some write -1."""
    several = [] if value is None else [value] if isinstance(value, int) else value
    return tuple(token for token in several if token >= 0)


KINDS = {bool: "true or false", str: "a text", object: "a number"}
"""What pydantic would read for one another."""


def _kind(value: Any) -> type:
    return next(kind for kind in KINDS if isinstance(value, kind))


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

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)

    vocab_size: int = pydantic.Field(gt=0)
    hidden_size: int = pydantic.Field(gt=0)
    num_hidden_layers: Layers
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    # Longest sequence in training; binds full attention only.
    max_position_embeddings: int | None = pydantic.Field(None, gt=0)

    quantization_config: Any = None

    aliases: ClassVar[dict[str, str]] = {}  # a format's own name for a key -> the name used here
    inert: ClassVar[frozenset[str]] = frozenset()

    @pydantic.field_validator("quantization_config")
    @classmethod
    def _as_trained(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("quantised weights are not supported")

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
            config = cls.model_validate(raw)
        except pydantic.ValidationError as error:
            return [_problem(file, dict(details)) for details in error.errors()]
        given = {key: getattr(config, cls.aliases.get(key, key), value) for key, value in raw.items()}
        return [
            ConfigError(file, key, value, f"must be {KINDS[_kind(given[key])]}")
            for key, value in raw.items()
            if isinstance(value, bool | int | str) and _kind(value) is not _kind(given[key])
        ]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Those that the model can say."""
        return tuple(token for token in token_ids(self.eos_token_id) if token < self.vocab_size)
