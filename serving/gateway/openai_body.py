"""What the bodies of OpenAI's protocol may hold, and what the gateway makes of them.

Strict: a field that is not understood is refused by name, one that would change the answer if it were heeded is refused
unless it says what happens anyhow. A field that is null is one that is not there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

from serving.engine.params import MAX_LOGPROBS, Grammar, SamplingParams
from serving.errors import InvalidArgumentError
from serving.gateway.requests import Ask, unique

MAX_PROMPTS = 128
MAX_INPUTS = 2048
MAX_MESSAGES = 4096
MAX_ID = 100  # characters of x-request-id
COMPLETION_TOKENS = 16  # OpenAI's default
CHAT_TOKENS = 1024  # an answer may be long, but a model that never ends it must not run for ever

ANY = object()
WITHOUT_EFFECT: dict[str, tuple[Any, ...] | object] = {  # fields that change nothing, and the values that they may have
    "user": ANY, "metadata": ANY, "safety_identifier": ANY, "prompt_cache_key": ANY, "parallel_tool_calls": ANY,
    "store": (False,), "service_tier": ("auto", "default"), "suffix": ("",), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
}  # fmt: skip
HINTS = {  # where pydantic would tell of every alternative
    "prompt": "must be a string, a list of strings, a list of token ids, or a list of such lists",
    "input": "must be a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "must be a string or a list of strings",
    "guided_json": "must be a JSON schema, as an object or as text",
}

Prompts = str | list[str] | list[int] | list[list[int]]
B = TypeVar("B", bound="Body")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = ""  # may be left out where only one is served
    timeout_s: float | None = None
    priority: int = 0

    @classmethod
    def read(cls: type[B], raw: Mapping[str, Any]) -> B:
        """Raises InvalidArgumentError, naming the field."""
        given = {}
        for name, value in raw.items():
            allowed = None if name in cls.model_fields else WITHOUT_EFFECT.get(name)
            if value is None or allowed is ANY:
                continue
            if isinstance(allowed, tuple):
                if value not in allowed:
                    raise InvalidArgumentError(name, value, "is not supported")
                continue
            given[name] = value
        try:
            return cls.model_validate(given)
        except pydantic.ValidationError as error:
            raise _refused(error) from None


def _refused(error: pydantic.ValidationError) -> InvalidArgumentError:
    first = error.errors(include_url=False)[0]
    top = str(first["loc"][0])
    if top in HINTS and first["type"] != "missing":
        return InvalidArgumentError(f"{top}: {HINTS[top]}")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return InvalidArgumentError(f"{name}: is no parameter that this server knows")
    if first["type"] == "missing":
        return InvalidArgumentError(f"{name}: is required")
    return InvalidArgumentError(name, first["input"], first["msg"])


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Generation(Body):
    """What both kinds of completion take. The names are OpenAI's, and beyond them our own."""

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    depth: str | None = None  # as text: fixed(2), gate(0.8), ...
    session_id: str = ""
    resumed_token_ids: list[int] = []  # of the continuation, that the client has already
    return_tokens: bool = (
        False  # each choice with its tokens: id, text, depth, why no deeper, log-probability
    )

    def params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Raises InvalidArgumentError."""
        plain = (
            "n", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "seed", "ignore_eos", "depth",
        )  # fmt: skip
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias={_token(key): bias for key, bias in self.logit_bias.items()},
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            grammar=_grammar(self),
            **{name: getattr(self, name) for name in plain},
        )

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream tells the usage. Raises InvalidArgumentError."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise InvalidArgumentError("stream_options: only with stream = true")
        return self.stream_options.include_usage


class Completion(Generation):
    """The body of /v1/completions."""

    prompt: Prompts
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None


class Chat(Generation):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class Embedding(Body):
    """The body of /v1/embeddings."""

    input: Prompts
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    pooling: str = "mean"


@dataclass(frozen=True, slots=True)
class Headers:
    """What a request's headers say."""

    request_id: str
    traceparent: str = ""
    credential: str = ""  # the API key

    def __post_init__(self) -> None:
        if len(self.request_id) > MAX_ID:
            raise InvalidArgumentError("x-request-id", self.request_id, f"at most {MAX_ID} characters")


@dataclass(frozen=True, slots=True)
class Work:
    """A completion of either kind, understood."""

    asks: list[Ask]  # one for each prompt
    body: Generation
    chat: bool = False
    echo: bool = False
    generates: bool = True  # else the prompt is all that comes back

    @property
    def logprobs(self) -> bool:
        return self.asks[0].params.logprobs is not None


def completion_from(body: Completion, headers: Headers) -> Work:
    """Raises InvalidArgumentError."""
    if body.best_of is not None and body.best_of != body.n:
        raise InvalidArgumentError("best_of", body.best_of, f"is not supported, other than n = {body.n}")
    prompts = prompts_from("prompt", body.prompt, MAX_PROMPTS)
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    generates = most != 0 or not body.echo
    params = body.params(most if generates else 1, body.logprobs)
    resumed = body.resumed_token_ids
    if resumed and len(prompts) > 1:
        raise InvalidArgumentError(
            "resumed_token_ids", f"{len(resumed)} tokens", "only one prompt is resumed"
        )
    asks = [_ask(prompt, body, params, headers, resumed=resumed) for prompt in prompts]
    return Work(asks, body, echo=body.echo, generates=generates)


def chat_from(body: Chat, prompt: str, headers: Headers) -> Work:
    """`prompt`: the messages as the model's template writes them. Raises InvalidArgumentError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidArgumentError("top_logprobs", body.top_logprobs, "needs logprobs = true")
    if not 0 <= (body.top_logprobs or 0) <= MAX_LOGPROBS:
        raise InvalidArgumentError("top_logprobs", body.top_logprobs, f"must be from 0 to {MAX_LOGPROBS}")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = body.params(
        CHAT_TOKENS if most is None else most, (body.top_logprobs or 0) if body.logprobs else None
    )
    more = {"add_special_tokens": False, "resumed": body.resumed_token_ids}
    return Work([_ask(prompt, body, params, headers, **more)], body, chat=True)


def embedding_asks(body: Embedding, headers: Headers) -> list[Ask]:
    """Raises InvalidArgumentError."""
    if body.dimensions is not None and body.dimensions < 1:
        raise InvalidArgumentError("dimensions", body.dimensions, "must be a whole number from 1")
    return [
        _ask(prompt, body, SamplingParams(), headers)
        for prompt in prompts_from("input", body.input, MAX_INPUTS)
    ]


def _ask(
    prompt: str | list[int],
    body: Generation | Embedding,
    params: SamplingParams,
    headers: Headers,
    **more: Any,
) -> Ask:
    return Ask(
        prompt=prompt,
        model=body.model,
        params=params,
        timeout_s=body.timeout_s,
        request_id=unique(headers.request_id),
        priority=body.priority,
        session_id=body.session_id if isinstance(body, Generation) else "",
        traceparent=headers.traceparent,
        credential=headers.credential,
        **more,
    )


def prompts_from(name: str, given: Prompts, most: int) -> list[str | list[int]]:
    """One or several. Raises InvalidArgumentError."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]  # a list of token ids is all of that
    if not 1 <= len(given) <= most:
        raise InvalidArgumentError(name, f"{len(given)} entries", f"must be 1 to {most}")
    return list(given)  # type: ignore[arg-type]


def messages_from(body: Chat) -> list[dict[str, Any]]:
    """As templates expect them: contents are text. Raises InvalidArgumentError."""
    if not 1 <= len(body.messages) <= MAX_MESSAGES:
        raise InvalidArgumentError(
            "messages", f"{len(body.messages)} entries", f"must be 1 to {MAX_MESSAGES}"
        )
    return [{**message, **_message(f"messages[{i}]", message)} for i, message in enumerate(body.messages)]


def _message(where: str, message: dict[str, Any]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidArgumentError(
            f"{where}.role", role, "must be a string such as system, user or assistant"
        )
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "".join(_text_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidArgumentError(f"{where}.content", content, "must be a string, or a list of text parts")
    return {"content": content}


def _text_part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidArgumentError(where, part, 'must be {"type": "text", "text": "..."}')
    return str(part["text"])


def _token(key: str) -> int:
    if not key.isdecimal():
        raise InvalidArgumentError("logit_bias", key, "must be a token id")
    return int(key)


def _grammar(body: Generation) -> Grammar | None:
    """What the text has to look like, if anything. Raises InvalidArgumentError."""
    found: dict[str, Grammar] = {}
    if body.response_format is not None:
        schema = _schema(body.response_format)
        if schema is not None:
            found["response_format"] = Grammar("json_schema", json.dumps(schema))
    if body.guided_json is not None:
        text = body.guided_json if isinstance(body.guided_json, str) else json.dumps(body.guided_json)
        found["guided_json"] = Grammar("json_schema", text)
    if body.guided_regex is not None:
        found["guided_regex"] = Grammar("regex", body.guided_regex)
    if body.guided_grammar is not None:
        found["guided_grammar"] = Grammar("lark", body.guided_grammar)
    if body.guided_choice is not None:
        if not body.guided_choice or not all(body.guided_choice):
            raise InvalidArgumentError(
                "guided_choice", body.guided_choice, "must hold strings that are not empty"
            )
        found["guided_choice"] = Grammar("lark", "start: " + " | ".join(map(json.dumps, body.guided_choice)))
    if len(found) > 1:
        first, second = list(found)[:2]
        raise InvalidArgumentError(f"{second}: cannot be together with {first}")
    return next(iter(found.values()), None)


def _schema(given: dict[str, Any]) -> dict[str, Any] | None:
    """The schema that a response_format asks for. Raises InvalidArgumentError."""
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise InvalidArgumentError("response_format.type", kind, "must be text, json_object or json_schema")
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise InvalidArgumentError(
            "response_format.json_schema.schema", schema, "must be a JSON schema, an object"
        )
    return schema
