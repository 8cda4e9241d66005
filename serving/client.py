"""A small gRPC client of our own service, for the command line."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc, models_pb2, models_pb2_grpc
from serving.engine.depth import DepthPolicy

CANCELLED = grpc.StatusCode.CANCELLED


class ClientError(Exception):
    """What the server, or the way to it, has against a request."""


@contextmanager
def connected(target: str) -> Iterator[grpc.Channel]:
    """A channel to host:port. Inside, an RPC's failure is raised as ClientError. FATHOM_API_KEY goes with every call;
    FATHOM_CA, a file of certificates to trust, means TLS."""
    with _channel(target) as channel:
        try:
            yield grpc.intercept_channel(channel, _Key(os.environ.get("FATHOM_API_KEY", "")))
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            detail = error.details() if isinstance(error, grpc.Call) else str(error)
            if code is grpc.StatusCode.UNAVAILABLE and "connect" in str(detail).lower():
                raise ClientError(f"no server answers at {target}: {detail}") from None
            raise ClientError(f"{code.name if code else 'error'}: {detail}") from None


def _channel(target: str) -> grpc.Channel:
    if "FATHOM_CA" not in os.environ:
        return grpc.insecure_channel(target)
    try:
        trusted = Path(os.environ["FATHOM_CA"]).read_bytes()
    except OSError as error:
        raise ClientError(f"FATHOM_CA: {error}") from None
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(trusted))


class _Key(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Shows an API key, if there is one."""

    def __init__(self, key: str):
        self._shown = (("authorization", f"Bearer {key}"),) if key else ()

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=(*(details.metadata or ()), *self._shown))


DEAD = ("ActorDied", "actor died", "Actor is unavailable")  # what Ray says of a gateway that is gone
AGAIN_S = 0.2  # between two tries after the first
RETRY_S = 30.0
"""That a broken stream waits for a server to go on."""


def generate(channel: grpc.Channel, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    """Messages as they come; leaving the iterator early cancels the request. A single continuation whose stream
    breaks goes on where it was as soon as a server answers again."""
    request.request_id = request.request_id or uuid.uuid4().hex
    stub = inference_pb2_grpc.InferenceStub(channel)
    until: float | None = None  # no break yet
    while True:
        call = stub.Generate(request)
        try:
            for message in call:
                until = None
                request.resumed_token_ids.extend(message.token_ids)
                yield message
            return
        except grpc.RpcError as error:
            began = bool(request.resumed_token_ids)
            if not (began and _broken(error) and request.sampling.n <= 1):
                raise
            if until is None:  # at once: the others are there
                until = time.monotonic() + RETRY_S
                continue
            if time.monotonic() > until:
                raise
            time.sleep(AGAIN_S)
        finally:
            call.cancel()


def _broken(error: grpc.RpcError) -> bool:
    """Whether the server, or a part of it, has gone: Ray's proxy reports a gateway's death as an internal error,
    HAProxy resets the stream."""
    if not isinstance(error, grpc.Call):
        return False
    code, details = error.code(), str(error.details())
    dead = code is grpc.StatusCode.INTERNAL and any(told in details for told in DEAD)
    reset = code is grpc.StatusCode.CANCELLED and "RST_STREAM" in details  # our own cancel is told otherwise
    return dead or reset or code is grpc.StatusCode.UNAVAILABLE


def models(channel: grpc.Channel) -> list[models_pb2.Model]:
    return list(models_pb2_grpc.ModelsStub(channel).List(models_pb2.ListModelsRequest()).models)


def as_dict(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def policy(chosen: DepthPolicy) -> pb.DepthPolicy:
    """A depth policy as a message."""
    message = pb.DepthPolicy(min_depth=chosen.min_depth, max_depth=chosen.max_depth, width=chosen.width)
    if chosen.kind == "fixed":
        message.fixed = chosen.depth or 0
    elif chosen.kind == "chain":
        message.chain.layers.extend(chosen.layers)
    elif chosen.kind in ("gate", "confidence", "converged"):
        criterion = getattr(message, chosen.kind)
        criterion.SetInParent()
        if chosen.threshold is not None:
            criterion.threshold = chosen.threshold
        if chosen.measure is not None:
            criterion.measure = pb.DepthPolicy.Measure.Value(chosen.measure.upper())
    elif chosen.kind is not None:
        getattr(message, chosen.kind).SetInParent()
    return message


SHADES = (27, 33, 39, 45, 49, 83, 154, 190, 220, 214, 208, 202, 196)
"""Of the terminal's 256 colours, from shallow to deep."""


def shade(depth: int, deepest: int) -> int:
    """The colour of a depth, where the whole range of colours stands for depths from 1 to the deepest."""
    share = (min(depth, deepest) - 1) / (deepest - 1) if deepest > 1 and depth > 1 else 0.0
    return SHADES[round(share * (len(SHADES) - 1))]


def deepest(channel: grpc.Channel, model: str) -> int:
    """The full depth of a model; without a name, of the deepest that is served."""
    return max((m.max_depth for m in models(channel) if model in ("", m.name)), default=1)


def coloured(message: pb.GenerateResponse, deepest: int) -> None:
    """Print the text of a message, each token in the colour of its depth."""
    at = 0
    for length, depth in zip(message.text_lengths, message.depths, strict=True):
        typer.secho(message.text[at : at + length], nl=False, fg=shade(depth, deepest))
        at += length
    typer.echo(message.text[at:], nl=False)
