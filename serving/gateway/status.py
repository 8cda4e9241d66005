"""Errors and the gRPC status codes that they are answered with."""

import grpc

from serving import errors

STATUS: dict[type[Exception], grpc.StatusCode] = {
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AbortedError: grpc.StatusCode.ABORTED,
    errors.DataLossError: grpc.StatusCode.DATA_LOSS,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
}

AGAIN_S = 1
"""When it is worth asking again what was refused for now."""

FOR_NOW = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE})

PUSHBACK = (("grpc-retry-pushback-ms", str(1000 * AGAIN_S)),)
"""Trailing metadata that says so to clients with a retry policy (gRFC A6)."""


def status_of(error: BaseException) -> grpc.StatusCode:
    """INTERNAL for what no client could have done better."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return grpc.StatusCode.INTERNAL
