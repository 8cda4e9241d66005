"""Between the engine's nouns and the messages that travel from replica to gateway."""

import json
from dataclasses import asdict
from typing import Any

from protos.fathom.internal.v1 import engine_pb2 as wire
from serving import errors
from serving.engine.core import Request
from serving.engine.depth import DepthPolicy
from serving.engine.news import Failed, FinishReason, Output, StateAfter, Usage
from serving.engine.params import Grammar, SamplingParams

_KINDS: dict[str, type[errors.RequestError]] = {
    kind.__name__: kind
    for kind in (
        errors.InvalidArgumentError,
        errors.NotFoundError,
        errors.OverloadedError,
        errors.UnavailableError,
        errors.FailedPreconditionError,
        errors.DataLossError,
        errors.DeadlineExceededError,
    )
}


def submit_from(request: Request, timeout_s: float | None) -> wire.Submit:
    """For a replica, whose clock is another: the deadline goes as what is left of it."""
    return wire.Submit(
        request_id=request.id,
        prompt=request.prompt,
        params=json.dumps({**asdict(request.params), "seed": request.seed}).encode(),
        score=request.score,
        embed=request.embed,
        resumed=request.resumed,
        state=request.state,
        keep=request.keep,
        timeout_s=timeout_s,
        priority=request.priority,
        owner=request.owner,
    )


def request_from(submit: wire.Submit, now: float) -> Request:
    """Raises InvalidArgumentError."""
    fields: dict[str, Any] = json.loads(submit.params)
    fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    if fields["depth"] is not None:
        fields["depth"] = DepthPolicy(**{**fields["depth"], "layers": tuple(fields["depth"]["layers"])})
    if fields["grammar"] is not None:
        fields["grammar"] = Grammar(**fields["grammar"])
    params = SamplingParams(**fields)
    return Request(
        id=submit.request_id,
        prompt=list(submit.prompt),
        params=params,
        score=submit.score,
        embed=submit.embed,
        resumed=list(submit.resumed),
        state=submit.state,
        keep=submit.keep,
        seed=params.seed or 0,
        priority=submit.priority,
        owner=submit.owner,
        deadline=now + submit.timeout_s if submit.HasField("timeout_s") else None,
    )


def tokens_from(out: Output) -> wire.Tokens:
    tokens = wire.Tokens(
        request_id=out.request_id,
        index=out.index,
        ids=out.ids,
        logprobs=out.logprobs,
        depths=out.depths,
        exit_reasons=out.exit_reasons,
        embedding=out.embedding,
    )
    for alternatives in out.top_logprobs:
        tokens.top_ids.extend(alternatives)
        tokens.top_logprobs.extend(alternatives.values())
    if out.finish_reason is not None:
        tokens.finish_reason = out.finish_reason.value
    if out.state is not None:
        tokens.state = out.state.data
        tokens.state_tokens = out.state.tokens
    if out.usage is not None:
        tokens.usage = json.dumps(asdict(out.usage)).encode()
    return tokens


def output_from(tokens: wire.Tokens) -> Output:
    return Output(
        request_id=tokens.request_id,
        index=tokens.index,
        ids=list(tokens.ids),
        depths=list(tokens.depths),
        exit_reasons=list(tokens.exit_reasons),
        logprobs=list(tokens.logprobs),
        top_logprobs=_alternatives(tokens) if tokens.top_ids else [],
        embedding=list(tokens.embedding),
        state=StateAfter(tokens.state_tokens, tokens.state) if tokens.state else None,
        finish_reason=FinishReason(tokens.finish_reason) if tokens.finish_reason else None,
        usage=Usage(**json.loads(tokens.usage)) if tokens.usage else None,
    )


def _alternatives(tokens: wire.Tokens) -> list[dict[int, float]]:
    """Of each id, the same number."""
    width = len(tokens.top_ids) // len(tokens.ids)
    pairs = list(zip(tokens.top_ids, tokens.top_logprobs, strict=True))
    return [dict(pairs[at : at + width]) for at in range(0, len(pairs), width)]


def failure(failed: Failed) -> wire.Failure:
    return wire.Failure(
        request_id=failed.request_id, code=type(failed.error).__name__, message=str(failed.error)
    )


def error_from(message: wire.Failure) -> Exception:
    """The error that a replica reported."""
    if message.code in _KINDS:
        return _KINDS[message.code](message.message)
    return RuntimeError(f"{message.code}: {message.message}")
