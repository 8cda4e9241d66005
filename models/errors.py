"""What can be wrong with a model: its configuration or its files."""

import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200
_short.maxlist = _short.maxtuple = _short.maxdict = 20


def brief(value: object) -> str:
    """A value as it is written, or the beginning of a long one."""
    return _short.repr(value)


class ModelError(Exception):
    """A model that cannot be loaded, with the reason a person needs to mend it."""


class ModelNotFoundError(ModelError):
    """There is no model of that name or path."""


class ConfigError(ModelError):
    """A config.json that asks for something impossible or not supported."""

    def __init__(self, file: object, field: str, value: object, limit: str):
        """Without a field the limit is between several, and names them and their values itself."""
        super().__init__(f"{file}: {field} = {brief(value)}: {limit}" if field else f"{file}: {limit}")
        self.field = field


class CheckpointError(ModelError):
    """Weights that are missing, misshapen, truncated, or in a format that is not loaded."""
