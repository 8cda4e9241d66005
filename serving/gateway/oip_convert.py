"""Between the tensors and parameters of the Open Inference Protocol and what the gateway works with.

The protocol says nothing of text generation: the tensors are named as in Triton's language model backends. Every
setting may come as a request parameter, as a tensor of one element, or in the JSON of `sampling_parameters`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protos.inference import grpc_service_pb2 as wire
from serving.engine.news import Output, Usage
from serving.engine.params import GRAMMARS, Grammar, SamplingParams
from serving.errors import InvalidArgumentError, NotFoundError
from serving.gateway.convert import deadline_of
from serving.gateway.keys import credential_of
from serving.gateway.requests import Ask, unique
from serving.gateway.tensors import Tensor, add_output, read_inputs

VERSION = "1"  # a model has one version at a time here

INPUTS = (  # name, datatype, shape: all optional but one of the first two
    ("text_input", "BYTES", [1]),
    ("input_ids", "INT32", [-1]),
    ("stream", "BOOL", [1]),
    ("exclude_input_in_output", "BOOL", [1]),
    ("sampling_parameters", "BYTES", [1]),
)
OUTPUTS = {
    "text_output": "BYTES",  # one element for each continuation in the response
    "index": "INT32",  # its number
    "finish_reason": "BYTES",  # empty while it goes on
    "length": "INT32",  # how many of the tokens below are its
    "token_ids": "INT32",  # of all continuations, one after the other; so below
    "depths": "INT32",
    "exit_reasons": "INT32",
    "logprobs": "FP32",
}
SAMPLING: dict[str, type] = {
    "n": int, "max_tokens": int, "min_tokens": int, "temperature": float, "top_k": int, "top_p": float, "min_p": float,
    "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float, "logit_bias": dict, "seed": int,
    "stop": list, "stop_token_ids": list, "ignore_eos": bool, "logprobs": int, "depth": str,
}  # fmt: skip
CONTROLS: dict[str, type] = {
    "stream": bool, "exclude_input_in_output": bool, "sampling_parameters": str, "timeout": int, "timeout_s": float,
    "priority": int, "triton_enable_empty_final_response": bool, "sequence_id": object, "sequence_start": bool,
    "sequence_end": bool,
}  # fmt: skip
SETTINGS: dict[str, type] = {**SAMPLING, **CONTROLS, **dict.fromkeys(GRAMMARS, str)}

Value = Any  # bool, int, float, str; from JSON also list, dict


@dataclass(frozen=True, slots=True)
class Sequence:
    """Requests of which each continues the one before, and whether this is the first or the last of them."""

    id: str
    start: bool
    end: bool


@dataclass(frozen=True, slots=True)
class Infer:
    """One inference request, understood."""

    id: str  # the client's name for it
    ask: Ask
    outputs: tuple[str, ...]
    stream: bool
    echo: str = ""  # begins every text
    sequence: Sequence | None = None


def infer_from(request: wire.ModelInferRequest, metadata: Mapping[str, str]) -> Infer:
    """Raises InvalidArgumentError naming the tensor or parameter, or NotFoundError."""
    check_version(request.model_version)
    tensors = read_inputs(request)
    settings = _settings(request, tensors)
    outputs = _outputs(request)
    params = {name: settings[name] for name in SAMPLING if name in settings}
    if "logprobs" in outputs:
        params.setdefault("logprobs", 0)
    grammars = [name for name in GRAMMARS if name in settings]
    if len(grammars) > 1:
        raise InvalidArgumentError(f"{grammars[0]} and {grammars[1]} cannot be together")
    if grammars:
        params["grammar"] = Grammar(grammars[0], settings[grammars[0]])
    prompt = _prompt(tensors)
    ask = Ask(
        credential=credential_of(metadata),
        prompt=prompt,
        model=request.model_name,
        params=SamplingParams(**params),
        timeout_s=_timeout(settings),
        deadline=deadline_of(metadata),
        request_id=unique(request.id),
        priority=_priority(settings.get("priority", 0)),
        traceparent=metadata.get("traceparent", ""),
    )
    stream, echo = settings.get("stream", False), ""
    if not settings.get("exclude_input_in_output", True):
        if stream or not isinstance(prompt, str):
            limit = "needs the prompt as text_input, and stream = false"
            raise InvalidArgumentError("exclude_input_in_output", False, limit)
        echo = prompt
    if not request.outputs and ask.params.logprobs is None:
        outputs = tuple(name for name in outputs if name != "logprobs")
    return Infer(request.id, ask, outputs, stream, echo, _sequence(settings))


def check_version(version: str) -> None:
    if version not in ("", VERSION):
        raise NotFoundError(f"model_version = {version!r}: must be {VERSION}, or empty")


def _prompt(tensors: Mapping[str, Tensor]) -> str | list[int]:
    text, ids = tensors.get("text_input"), tensors.get("input_ids")
    if (text is None) == (ids is None):
        raise InvalidArgumentError("inputs: give one of text_input and input_ids")
    if text is not None:
        return _string("text_input", _only("text_input", text))
    assert ids is not None
    if not ids.datatype.startswith(("INT", "UINT")):
        raise InvalidArgumentError("inputs[input_ids].datatype", ids.datatype, "must be one of integers")
    if any(size != 1 for size in ids.shape[:-1]):
        raise InvalidArgumentError("inputs[input_ids].shape", list(ids.shape), "must hold one prompt")
    return ids.values


def _settings(request: wire.ModelInferRequest, tensors: Mapping[str, Tensor]) -> dict[str, Value]:
    """Every setting that is given, in its own type. Raises InvalidArgumentError for an unknown one."""
    given: dict[str, Value] = {}

    def add(name: str, value: Value, where: str) -> None:
        if name not in SETTINGS:
            known = ", ".join(sorted(SETTINGS))
            raise InvalidArgumentError(f"{where}.{name}: is unknown; known are {known}")
        if name in given:
            raise InvalidArgumentError(f"{where}.{name}: is given twice")
        given[name] = _typed(name, value)

    for name, parameter in request.parameters.items():
        which = parameter.WhichOneof("parameter_choice")
        if which is None:
            raise InvalidArgumentError(f"parameters.{name}", None, "has no value")
        add(name, getattr(parameter, which), "parameters")
    for name, tensor in tensors.items():
        if name not in ("text_input", "input_ids"):
            add(name, _only(name, tensor), "inputs")
    for name, value in _json(given.pop("sampling_parameters", "{}")).items():
        if name in CONTROLS:
            raise InvalidArgumentError(
                f"sampling_parameters.{name}: goes among the parameters of the request"
            )
        add(name, value, "sampling_parameters")
    return given


def _only(name: str, tensor: Tensor) -> Value:
    if len(tensor.values) != 1:
        raise InvalidArgumentError(f"inputs[{name}].shape", list(tensor.shape), "must have one element")
    return tensor.values[0]


def _json(text: str) -> dict[str, Value]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidArgumentError(f"sampling_parameters = {text[:60]!r}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgumentError("sampling_parameters", value, "must be a JSON object")
    return value


def _typed(name: str, value: Value) -> Value:
    """A setting in its own type. Some clients write the numbers of `sampling_parameters` as strings."""
    kind = SETTINGS[name]
    if isinstance(value, bytes):
        value = _string(name, value)
    if kind in (int, float) and isinstance(value, str):
        try:
            value = kind(value)
        except ValueError:
            raise InvalidArgumentError(name, value, "must be a number") from None
    if kind is list and isinstance(value, (str, int)):
        value = [value]
    if kind is dict and isinstance(value, dict):
        return {_token(name, key): bias for key, bias in value.items()}
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind not in (bool, object)):
        raise InvalidArgumentError(name, value, f"must be of type {kind.__name__}")
    return value


def _token(name: str, key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise InvalidArgumentError(name, key, "must be a token id") from None


def _string(name: str, value: Value) -> str:
    if not isinstance(value, bytes):
        raise InvalidArgumentError(f"inputs[{name}].datatype", type(value).__name__, "must be BYTES")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"inputs[{name}]: not UTF-8: {error}") from None


def _timeout(settings: Mapping[str, Value]) -> float | None:
    """Seconds. `timeout` is Triton's, in microseconds, 0 for the server's choice."""
    if "timeout_s" in settings and "timeout" in settings:
        raise InvalidArgumentError("timeout (in microseconds) and timeout_s say the same thing: give one")
    if settings.get("timeout"):
        return settings["timeout"] / 1e6
    return settings.get("timeout_s")


def _priority(level: int) -> int:
    """Triton's levels are 1 for the most urgent, 2 for the next ..., 0 for what is usual; ours are 100 to -100."""
    if not 0 <= level <= 201:
        raise InvalidArgumentError("priority", level, "must be 0, or from 1 (first) to 201 (last)")
    return 101 - level if level else 0


def _sequence(settings: Mapping[str, Value]) -> Sequence | None:
    """None for a request by itself."""
    given = settings.get("sequence_id", 0)
    start, end = (settings.get(f"sequence_{name}", False) for name in ("start", "end"))
    if not isinstance(given, (int, str)) or isinstance(given, bool):
        raise InvalidArgumentError("sequence_id", given, "must be an integer or a string")
    if not given and (start or end):
        raise InvalidArgumentError("sequence_id", given, "is missing for sequence_start or sequence_end")
    return Sequence(str(given), start, end) if given else None


def _outputs(request: wire.ModelInferRequest) -> tuple[str, ...]:
    for wanted in request.outputs:
        if wanted.name not in OUTPUTS:
            raise InvalidArgumentError("outputs", wanted.name, f"must be among {', '.join(OUTPUTS)}")
        for parameter in wanted.parameters:
            raise InvalidArgumentError(f"outputs[{wanted.name}].parameters", parameter, "is not supported")
    return tuple(wanted.name for wanted in request.outputs) or tuple(OUTPUTS)


@dataclass(slots=True)
class Answer:
    """What one response tells: of each continuation in it, its text and its news."""

    texts: list[str]
    news: list[Output]

    @property
    def usage(self) -> Usage | None:
        return next((out.usage for out in self.news if out.usage is not None), None)


def response_from(infer: Infer, answer: Answer, last: bool) -> wire.ModelInferResponse:
    response = wire.ModelInferResponse(model_name=infer.ask.model, model_version=VERSION, id=infer.id)
    response.parameters["triton_final_response"].bool_param = last
    for name in infer.outputs:
        add_output(response, name, OUTPUTS[name], _VALUES[name](answer))
    usage = answer.usage
    if usage is not None:
        for key in Usage.__slots__:
            _set(response.parameters[key], getattr(usage, key))
    return response


_VALUES = {
    "text_output": lambda a: a.texts,
    "index": lambda a: [out.index for out in a.news],
    "finish_reason": lambda a: [str(out.finish_reason or "") for out in a.news],
    "length": lambda a: [len(out.ids) for out in a.news],
    "token_ids": lambda a: [token for out in a.news for token in out.ids],
    "depths": lambda a: [depth for out in a.news for depth in out.depths],
    "exit_reasons": lambda a: [reason for out in a.news for reason in out.exit_reasons],
    "logprobs": lambda a: [logprob for out in a.news for logprob in out.logprobs],
}


def _set(parameter: wire.InferParameter, value: float | str) -> None:
    kinds = {int: "int64_param", float: "double_param", str: "string_param"}
    setattr(parameter, kinds[type(value)], value)
