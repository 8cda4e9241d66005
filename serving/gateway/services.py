"""The gRPC services that the ingress announces.

Ray Serve's ingress parses a request with the generated code and calls the deployment's method of the RPC's name. Both
are in the way here: a message that does not parse would be answered by gRPC, before anybody could name the field, and
two services with a method of the same name could not be told apart. So the ingress hands on the bytes, with the full
name of the method, and the gateway parses.
"""

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2

from protos.fathom.v1 import inference_pb2, models_pb2, sessions_pb2
from protos.inference import grpc_service_pb2

FILES: tuple[ModuleType, ...] = (inference_pb2, models_pb2, sessions_pb2, health_pb2, grpc_service_pb2)


@dataclass(frozen=True, slots=True)
class Call:
    """One message of an RPC, not parsed yet."""

    service: str  # fathom.v1.Inference
    method: str  # Generate
    body: bytes


def services() -> list[ServiceDescriptor]:
    return [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]


def add_services(servicer: Any, server: Any) -> None:
    """Announce every service to a gRPC server; one of Ray Serve's `grpc_servicer_functions`."""
    for service in services():
        handlers = {m.name: _handler(servicer, service.full_name, m) for m in service.methods}
        generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
        server.add_generic_rpc_handlers((generic,))


def _handler(servicer: Any, service: str, method: Any) -> grpc.RpcMethodHandler:
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    kind = kinds[method.client_streaming, method.server_streaming]
    return kind(getattr(servicer, method.name), request_deserializer=partial(Call, service, method.name))
