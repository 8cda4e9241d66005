"""From the messages of a conversation to the text that a model continues, by its own template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.errors import FailedPreconditionError, InvalidArgumentError


class ChatTemplate:
    """A Jinja template, in a sandbox, with the few functions that published templates call."""

    def __init__(self, template: str, **special_tokens: str):
        """A template that cannot be compiled only fails the requests that need it."""
        self._special_tokens = special_tokens
        self._fault = ""
        try:
            self._template = _ENVIRONMENT.from_string(template)
        except TemplateError as error:
            self._fault = f"the chat template of this model cannot be used: {error}"

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt, special tokens written out, up to where the answer begins. `options` are the
        template's own.

        Raises FailedPreconditionError for a broken template, InvalidArgumentError for messages that it
        refuses."""
        if self._fault:
            raise FailedPreconditionError(self._fault)
        given = {"add_generation_prompt": True, **options}
        try:
            return self._template.render(messages=messages, **self._special_tokens, **given)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise InvalidArgumentError(f"messages: the chat template refuses them: {error}") from None


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training; its text is what stands in it."""

    tags = {"generation"}  # noqa: RUF012 (the library's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike Jinja's own, without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # templates expect local time
    return made


_ENVIRONMENT = _environment()
