"""The gRPC door: fathom.v1, grpc.health.v1 and inference.GRPCInferenceService."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Protocol

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import models_pb2
from serving.config import GatewaySpec
from serving.errors import NotFoundError, OverloadedError
from serving.gateway import convert
from serving.gateway.fleet import Fleet
from serving.gateway.keys import credential_of
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.oip import Metadata, Oip
from serving.gateway.requests import Requests
from serving.gateway.services import Call, services
from serving.gateway.sessions_rpc import SessionsRpc
from serving.gateway.status import FOR_NOW, PUSHBACK, status_of

log = logging.getLogger("fathom.gateway")

MAX_DETAILS = 2000  # bytes of a status' text

WORK = {  # RPCs that nothing is done for without room in a queue, and what listeners call them
    "/fathom.v1.Inference/Generate": "generate",
    "/fathom.v1.Inference/Score": "score",
    "/inference.GRPCInferenceService/ModelInfer": "generate",
}


Pairs = Sequence[tuple[str, str | bytes]]


class Context(Protocol):
    """The part of a gRPC context that Ray Serve gives to a deployment."""

    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Pairs) -> None: ...
    def invocation_metadata(self) -> Pairs: ...


class StreamEndedError(Exception):
    """Ends a stream whose context already has a status."""


class Rpc:
    """One method for each RPC: bytes in, messages out, and a status for every error."""

    def __init__(self, requests: Requests, fleet: Fleet, spec: GatewaySpec, metrics: GatewayMetrics):
        self._requests = requests
        self._fleet = fleet
        self._max_bytes = int(spec.max_message_mb * (1 << 20))
        self._metrics = metrics
        oip = Oip(requests, fleet, metrics)
        self._unary = {
            **oip.unary,
            **SessionsRpc(requests.sessions, fleet, requests.keys).unary,
            ("fathom.v1.Inference", "Score"): self._score,
            ("fathom.v1.Models", "List"): self._list,
            ("fathom.v1.Models", "Get"): self._get,
            ("grpc.health.v1.Health", "Check"): self._check,
            ("grpc.health.v1.Health", "List"): self._list_health,
        }
        self._streams = {
            ("fathom.v1.Inference", "Generate"): self._generate,
            ("grpc.health.v1.Health", "Watch"): self._watch,
        }
        self._exchanges = oip.exchanges
        self._most = spec.max_streams
        self._held: Counter[str] = Counter()  # streams that carry no request yet, or never, by method

    def full(self, path: str, metadata: Pairs) -> OverloadedError | None:
        """Why an RPC, by its full name, is refused before its message has been read; None where it is to be read."""
        if path not in WORK:
            return None
        told = _texts(metadata)
        error = self._requests.full(WORK[path], credential_of(told), traceparent=told.get("traceparent", ""))
        if error is not None:
            self._metrics.ended(path.rpartition("/")[2], grpc.StatusCode.RESOURCE_EXHAUSTED.name)
        return error

    async def unary(self, call: Call, context: Context) -> Message:
        """Answer an RPC with one response. After an error the message is empty, and the context has the status."""
        try:
            self._bound(call)
            answer = await self._unary[call.service, call.method](call.body, _metadata(context))
        except (Exception, asyncio.CancelledError) as error:
            self._fail(call, error, context)
            return pb.ScoreResponse()  # nobody reads it
        self._metrics.ended(call.method, "OK")
        return answer

    async def stream(self, call: Call, context: Context) -> AsyncGenerator[Message]:
        """Answer an RPC with a stream of responses."""
        try:
            self._bound(call)
            method = self._streams[call.service, call.method]
            async with aclosing(method(call.body, _metadata(context))) as answers:
                async for answer in answers:
                    yield answer
        except GeneratorExit:
            self._metrics.ended(call.method, grpc.StatusCode.CANCELLED.name)
            raise
        except (Exception, asyncio.CancelledError) as error:
            self._fail(call, error, context)
            # The context travels with a message, and there is none any more; with an exception it travels, too.
            raise StreamEndedError(str(error)) from None
        self._metrics.ended(call.method, "OK")

    async def exchange(
        self, service: str, method: str, calls: AsyncIterator[Call], context: Context
    ) -> AsyncGenerator[Message]:
        """Answer an RPC with a stream both ways."""

        async def bodies() -> AsyncIterator[bytes]:
            async for call in calls:
                self._bound(call)
                yield call.body

        try:
            with self._hold(method):
                async with aclosing(
                    self._exchanges[service, method](bodies(), _metadata(context))
                ) as answers:
                    async for answer in answers:
                        yield answer
        except Exception as error:  # the requests of a stream that is cancelled are counted one by one
            self._fail(Call(service, method, b""), error, context)
            raise StreamEndedError(str(error)) from None

    @contextmanager
    def _hold(self, method: str) -> Iterator[None]:
        """A stream that its client may leave open for ever. Raises OverloadedError where there are too many."""
        if self._held[method] >= self._most:
            raise OverloadedError(f"this gateway carries {self._most} streams of {method}, and no more")
        self._held[method] += 1
        try:
            yield
        finally:
            self._held[method] -= 1

    def _bound(self, call: Call) -> None:
        if len(call.body) > self._max_bytes:
            raise OverloadedError(
                f"the message has {len(call.body)} bytes: at most {self._max_bytes} are taken"
            )

    def _fail(self, call: Call, error: BaseException, context: Context) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._metrics.ended(call.method, grpc.StatusCode.CANCELLED.name)
            raise error
        code = status_of(error)
        if code is grpc.StatusCode.INTERNAL:
            log.error("%s/%s failed", call.service, call.method, exc_info=error)
        context.set_code(code)
        context.set_details(_bounded(str(error) or type(error).__name__))
        if code in FOR_NOW:
            context.set_trailing_metadata(PUSHBACK)
        self._metrics.ended(call.method, code.name)

    async def _generate(self, body: bytes, metadata: Metadata) -> AsyncGenerator[Message]:
        ask = convert.ask_from(convert.parse(pb.GenerateRequest, body), metadata)
        async with aclosing(self._requests.generate(ask)) as pieces:
            async for piece in pieces:
                yield convert.response_from(piece)

    async def _score(self, body: bytes, metadata: Metadata) -> Message:
        ask = convert.ask_from_score(convert.parse(pb.ScoreRequest, body), metadata)
        ids, out = await self._requests.score(ask)
        return convert.score_from(out.request_id, ids, out)

    async def _list(self, body: bytes, metadata: Metadata) -> Message:
        convert.parse(models_pb2.ListModelsRequest, body)
        caller = self._requests.keys.authenticate(credential_of(metadata))
        ready = [m for m in self._fleet.models if self._fleet.replicas(m) and caller.may_use(m)]
        return models_pb2.ListModelsResponse(models=[self._model(name) for name in ready])

    async def _get(self, body: bytes, metadata: Metadata) -> Message:
        request = convert.parse(models_pb2.GetModelRequest, body)
        caller = self._requests.keys.authenticate(credential_of(metadata))  # before any model is named
        name = self._fleet.resolve(request.name)
        caller.check(name)
        return self._model(name)

    def _model(self, name: str) -> models_pb2.Model:
        description, replicas = self._fleet.describe(name)
        slots = sum(r.load.slots for r in replicas)
        return convert.model_from(description, len(replicas), slots, replicas[0].tokenizer is not None)

    async def _check(self, body: bytes, metadata: Metadata) -> Message:
        return self._health(convert.parse(health_pb2.HealthCheckRequest, body).service)

    async def _list_health(self, body: bytes, metadata: Metadata) -> Message:
        convert.parse(health_pb2.HealthListRequest, body)
        names = ["", *(s.full_name for s in services())]
        return health_pb2.HealthListResponse(statuses={name: self._health(name) for name in names})

    async def _watch(self, body: bytes, metadata: Metadata) -> AsyncGenerator[Message]:
        service = convert.parse(health_pb2.HealthCheckRequest, body).service
        last = None
        with self._hold("Watch"):
            while True:
                now = self._watched(service)
                if last is None or now.status != last.status:
                    yield now
                    last = now
                await self._fleet.changed()

    def _watched(self, service: str) -> health_pb2.HealthCheckResponse:
        """By the health protocol, a watcher waits for a service that is not known yet."""
        try:
            return self._health(service)
        except NotFoundError:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)

    def _health(self, service: str) -> health_pb2.HealthCheckResponse:
        """ "" is alive when it answers; a service is ready when every model has a replica."""
        known = {s.full_name for s in services()}
        if service and service not in known:
            raise NotFoundError(f"service = {service!r}: must be empty or one of {', '.join(sorted(known))}")
        ready = not service or all(self._fleet.replicas(name) for name in self._fleet.models)
        state = (
            health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        return health_pb2.HealthCheckResponse(status=state)


def _bounded(details: str) -> str:
    """As much as fits a status: a client takes 8 KiB of metadata, and gRPC writes up to three bytes for each of
    UTF-8; of what is longer, it would not even see the code."""
    data = details.encode("utf-8", "replace")
    return details if len(data) <= MAX_DETAILS else data[: MAX_DETAILS - 3].decode("utf-8", "ignore") + "..."


def _texts(metadata: Pairs | None) -> dict[str, str]:
    """The text that came with a call, by its key; of a key given twice, the last."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def _metadata(context: Context) -> dict[str, str]:
    """The text that came with a call, and its deadline."""
    found = _texts(context.invocation_metadata())
    found.pop(convert.DEADLINE, None)
    remaining = getattr(context, "time_remaining", None)  # Ray Serve's context does not know
    left = None if remaining is None else remaining()
    if left is not None:
        found[convert.DEADLINE] = repr(time.monotonic() + left)
    return found
