"""Between protobuf messages and what the gateway works with. Strict: what is not understood is refused, by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import models_pb2
from serving.engine.depth import DepthPolicy
from serving.engine.description import Description
from serving.engine.news import FinishReason, Output, Usage
from serving.engine.params import Grammar, SamplingParams
from serving.errors import InvalidArgumentError
from serving.gateway.keys import credential_of
from serving.gateway.requests import Ask, Piece

M = TypeVar("M", bound=Message)

DEADLINE = "grpc-deadline"
"""Among what came with a call: when its client stops waiting, in seconds on the monotonic clock. It is the door that
writes it there; gRPC keeps such names to itself."""

FINISH = {
    FinishReason.STOP: pb.STOP,
    FinishReason.LENGTH: pb.LENGTH,
    FinishReason.DEADLINE: pb.DEADLINE,
    FinishReason.CANCELLED: pb.CANCELLED,
}


def parse(kind: type[M], body: bytes) -> M:
    """Raises InvalidArgumentError for bytes that are not such a message, or hold fields that it does not have."""
    message = kind()
    try:
        message.ParseFromString(body)
    except (DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"the message is not a valid {kind.DESCRIPTOR.full_name}: {error}"
        ) from None
    _refuse_unknown(message)
    return message


def _refuse_unknown(message: Message) -> None:
    """A parameter that is ignored in silence would be worse than an error."""
    name = message.DESCRIPTOR.full_name
    for unknown in UnknownFieldSet(message):  # type: ignore[attr-defined]  # it is iterable
        raise InvalidArgumentError(f"field number {unknown.field_number} of {name} is unknown to this server")
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in value if field.is_repeated else (value,):
            _refuse_unknown(part)


def deadline_of(metadata: Mapping[str, str]) -> float | None:
    return float(metadata[DEADLINE]) if DEADLINE in metadata else None


def ask_from(request: pb.GenerateRequest, metadata: Mapping[str, str]) -> Ask:
    """Raises InvalidArgumentError."""
    return Ask(
        prompt=_prompt(request, empty=bool(request.session_id)),
        model=request.model,
        params=params_from(
            request.sampling, policy_from(request.depth) if request.HasField("depth") else None
        ),
        timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
        deadline=deadline_of(metadata),
        request_id=request.request_id,
        priority=request.priority,
        session_id=request.session_id,
        resumed=list(request.resumed_token_ids),
        traceparent=metadata.get("traceparent", ""),
        credential=credential_of(metadata),
    )


def ask_from_score(request: pb.ScoreRequest, metadata: Mapping[str, str]) -> Ask:
    """Raises InvalidArgumentError."""
    return Ask(
        prompt=_prompt(request),
        model=request.model,
        params=SamplingParams(depth=policy_from(request.depth) if request.HasField("depth") else None),
        timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
        deadline=deadline_of(metadata),
        request_id=request.request_id,
        priority=request.priority,
        traceparent=metadata.get("traceparent", ""),
        credential=credential_of(metadata),
    )


def policy_from(depth: pb.DepthPolicy) -> DepthPolicy | None:
    """None where the message names no policy and no bounds. Raises InvalidArgumentError."""
    kind = depth.WhichOneof("policy")
    fields: dict[str, Any] = {
        name: getattr(depth, name) for name in ("min_depth", "max_depth", "width") if depth.HasField(name)
    }
    if kind is None:
        return DepthPolicy(None, **fields) if fields else None
    if kind == "fixed":
        fields["depth"] = depth.fixed
    elif kind == "chain":
        fields["layers"] = tuple(depth.chain.layers)
    elif kind in ("gate", "confidence", "converged"):
        criterion = getattr(depth, kind)
        if criterion.HasField("threshold"):
            fields["threshold"] = criterion.threshold
        if kind != "gate":
            fields["measure"] = _measure(kind, criterion.measure)
        elif criterion.measure != pb.DepthPolicy.MEASURE_UNSPECIFIED:
            raise InvalidArgumentError("depth.gate.measure", criterion.measure, "a gate is its own measure")
    return DepthPolicy(kind, **fields)


def _measure(kind: str, number: int) -> str:
    names = pb.DepthPolicy.Measure.keys()
    if number not in pb.DepthPolicy.Measure.values():
        raise InvalidArgumentError(f"depth.{kind}.measure", number, "is no such measure")
    if number == pb.DepthPolicy.MEASURE_UNSPECIFIED:
        return "probability" if kind == "confidence" else "latent_diff"
    return str(names[number].lower())


def _prompt(request: pb.GenerateRequest | pb.ScoreRequest, *, empty: bool = False) -> str | list[int]:
    which = request.WhichOneof("prompt")
    if which is None and not empty:
        raise InvalidArgumentError("prompt", None, "give text or tokens")
    prompt = request.text if which == "text" else list(request.tokens.ids)
    if not prompt and not empty:
        raise InvalidArgumentError("prompt", prompt, "must not be empty")
    return prompt


def params_from(sampling: pb.SamplingParams, depth: DepthPolicy | None = None) -> SamplingParams:
    """Fields that are not there take the defaults. Raises InvalidArgumentError."""
    given: dict[str, Any] = {"depth": depth}
    for field, value in sampling.ListFields():
        if field.name == "logit_bias":
            given[field.name] = dict(value)
        elif field.name == "grammar":
            given[field.name] = grammar_from(value)
        elif field.is_repeated:
            given[field.name] = tuple(value)
        else:
            given[field.name] = value
    for declared in sampling.DESCRIPTOR.fields:  # a field that is there with its zero value is not listed
        if declared.has_presence and declared.message_type is None and sampling.HasField(declared.name):
            given[declared.name] = getattr(sampling, declared.name)
    return SamplingParams(**given)


def grammar_from(grammar: pb.Grammar) -> Grammar:
    """Raises InvalidArgumentError."""
    kind = grammar.WhichOneof("grammar")
    if kind is None:
        raise InvalidArgumentError("grammar", None, "give json_schema, regex or lark")
    return Grammar(kind, getattr(grammar, kind))


def response_from(piece: Piece) -> pb.GenerateResponse:
    out = piece.news
    response = pb.GenerateResponse(
        request_id=piece.request_id,
        index=piece.index,
        text=piece.text,
        token_ids=out.ids,
        logprobs=out.logprobs,
        top_logprobs=[pb.TopLogprobs(token_ids=list(t), logprobs=list(t.values())) for t in out.top_logprobs],
        depths=out.depths,
        exit_reasons=out.exit_reasons,  # type: ignore[arg-type]  # numbers, which are quicker than names
        text_lengths=piece.lengths,
    )
    if out.finish_reason is not None:
        response.finish_reason = FINISH[out.finish_reason]
    if out.usage is not None:
        response.usage.CopyFrom(usage_from(out.usage))
    return response


def score_from(request_id: str, ids: list[int], out: Output) -> pb.ScoreResponse:
    return pb.ScoreResponse(
        request_id=request_id,
        token_ids=ids,
        logprobs=out.logprobs,
        depths=out.depths,
        usage=usage_from(out.usage) if out.usage is not None else None,
    )


def usage_from(usage: Usage) -> pb.Usage:
    return pb.Usage(**{name: getattr(usage, name) for name in pb.Usage.DESCRIPTOR.fields_by_name})


def model_from(description: Description, replicas: int, slots: int, has_tokenizer: bool) -> models_pb2.Model:
    known = models_pb2.Model.DESCRIPTOR.fields_by_name
    fields = {name: getattr(description, name) for name in Description.__slots__ if name in known}
    return models_pb2.Model(
        **{**fields, "replicas": replicas, "slots": slots, "has_tokenizer": has_tokenizer}
    )
