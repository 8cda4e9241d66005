"""A small gRPC client of our own service, for the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc, models_pb2, models_pb2_grpc

CANCELLED = grpc.StatusCode.CANCELLED


class ClientError(Exception):
    """What the server, or the way to it, has against a request."""


@contextmanager
def connected(target: str) -> Iterator[grpc.Channel]:
    """A channel to host:port. Inside, an RPC's failure is raised as ClientError."""
    with grpc.insecure_channel(target) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            detail = error.details() if isinstance(error, grpc.Call) else str(error)
            if code is grpc.StatusCode.UNAVAILABLE and "connect" in str(detail).lower():
                raise ClientError(f"no server answers at {target}: {detail}") from None
            raise ClientError(f"{code.name if code else 'error'}: {detail}") from None


def generate(channel: grpc.Channel, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    """Messages as they come; leaving the iterator early cancels the request."""
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
    try:
        yield from call
    finally:
        call.cancel()


def models(channel: grpc.Channel) -> list[models_pb2.Model]:
    return list(models_pb2_grpc.ModelsStub(channel).List(models_pb2.ListModelsRequest()).models)


def as_dict(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)
