"""Turns groups of configuration into flags of the command line, so that a field is its flag, help and limits
in one place."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from loadtest.config import Flags


def with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Typer sees every field of the command's Flags parameters as an option; the command gets the groups,
    validated."""
    hints = get_type_hints(command, include_extras=True)
    contexts = [name for name, hint in hints.items() if hint is typer.Context]
    groups = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Flags)
    }

    @wraps(command)
    def called(**values: Any) -> Any:
        if any(values[name].invoked_subcommand for name in contexts):
            return None  # the flags belong to the command that follows
        for name, group in groups.items():
            values[name] = group.read({field: values.pop(field) for field in group.model_fields})
        return command(**values)

    options = [option for group in groups.values() for option in _options(group)]
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name not in groups
    ]
    called.__signature__ = inspect.Signature(own + options)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in own + options}
    return called


def _options(group: type[Flags]) -> list[inspect.Parameter]:
    made = []
    for name, field in group.model_fields.items():
        kind, choices = _plain(field.annotation)
        option = typer.Option(
            help=field.description,
            rich_help_panel=group.panel,
            metavar=f"[{'|'.join(choices)}]" if choices else None,
            show_default=field.default not in (None, "", ()),
        )
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        made.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return made


def _plain(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The type that typer parses, and the values that pydantic will allow."""
    if get_origin(hint) in (Union, UnionType):
        inner, choices = _plain(next(part for part in get_args(hint) if part is not NoneType))
        return inner | None, choices
    if get_origin(hint) is Literal:
        return str, get_args(hint)
    if get_origin(hint) is tuple:
        return list[str], ()
    if hint not in (str, int, float, bool, Path):
        raise TypeError(f"no flag for a field of type {hint}")
    return hint, ()
