"""A gateway's own ports, for clients that come without a proxy between: gRPC and HTTP in the gateway's process.

Several gateways of one node listen at the same port; the kernel gives each new connection to one of them, and none to
one that has died.
"""

import asyncio
import resource
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
import uvicorn
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from serving.config import GatewaySpec
from serving.gateway.connection import connection
from serving.gateway.rpc import Rpc, StreamEndedError
from serving.gateway.services import Call, add_services, services
from serving.gateway.status import PUSHBACK

KEEPALIVE_MS = 20_000
"""After so long without a word the client is asked for a sign of life: one that vanished holds no slot."""


HANDSHAKE_MS = 20_000
"""In which a connection has to turn out to be HTTP/2."""


def most_connections() -> int:
    """That one door holds at a time, so that files and streams to replicas can be opened still."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 8


class GrpcDoor:
    """A gRPC server with every service, reflection included."""

    def __init__(self, rpc: Rpc, spec: GatewaySpec):
        room = int((spec.max_message_mb + 1) * (1 << 20))  # the gateway itself says what is too much
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", room),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
                ("grpc.max_allowed_incoming_connections", most_connections()),
            ]
        )
        self._server.add_generic_rpc_handlers((_Doorman(rpc),))  # asked before the services are
        add_services(_Servicer(rpc, spec.reader_patience_s), self._server)
        names = [service.full_name for service in services()]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self._server)

    async def open(self, host: str, port: int) -> int:
        """Returns the port, any where 0 was given. Raises RuntimeError where it is not to be had."""
        bound = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        await self._server.start()
        return bound

    async def close(self, grace_s: float) -> None:
        """Takes no new calls; those under way may end within the grace."""
        await self._server.stop(grace_s)


class _Doorman(grpc.GenericRpcHandler):
    """Turns away those for whom there is no room, without reading what they have sent."""

    def __init__(self, rpc: Rpc):
        self._rpc = rpc

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        error = self._rpc.full(call.method, call.invocation_metadata)
        if error is None:
            return None

        async def refuse(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details(str(error))
            context.set_trailing_metadata(PUSHBACK)

        # Whatever kind of RPC it is: only of a stream is no message read unless somebody asks for it.
        return grpc.stream_stream_rpc_method_handler(refuse)


class _Servicer:
    """A method for each RPC, by its bare name."""

    def __init__(self, rpc: Rpc, patience_s: float):
        self._rpc, self._patience = rpc, _Patience(patience_s)
        self._methods = {m.name: (s.full_name, m) for s in services() for m in s.methods}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        service, method = self._methods[name]

        async def unary(call: Call, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            return (await self._rpc.unary(call, context)).SerializeToString()

        async def stream(call: Call, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await self._send(self._rpc.stream(call, context), context)

        async def exchange(calls: AsyncIterator[Call], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await self._send(self._rpc.exchange(service, name, calls, context), context)

        return exchange if method.client_streaming else stream if method.server_streaming else unary

    async def _send(
        self, answers: AsyncGenerator[Message], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Answers, until the client has not taken one for too long."""
        task = asyncio.current_task()
        assert task is not None
        try:
            async with aclosing(answers):
                async for answer in answers:
                    self._patience.begins(task)
                    await context.write(answer.SerializeToString())
                    self._patience.ends(task)
        except StreamEndedError:
            pass  # the context has the status
        except asyncio.CancelledError:
            if not self._patience.lost(task):
                raise
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details(f"the client has not read for reader_patience_s = {self._patience.seconds:g}")
        finally:
            self._patience.ends(task)


class _Patience:
    """Cancels tasks whose writing takes too long. One look at all of them from time to time: a timer for each message
    would cost as much as the message."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._since: dict[asyncio.Task[Any], float] = {}
        self._lost: set[asyncio.Task[Any]] = set()
        self._look: asyncio.TimerHandle | None = None

    def begins(self, task: asyncio.Task[Any]) -> None:
        self._since[task] = time.monotonic()
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(self.seconds / 4, self._cancel)

    def ends(self, task: asyncio.Task[Any]) -> None:
        self._since.pop(task, None)

    def lost(self, task: asyncio.Task[Any]) -> bool:
        """Whether it was lost with this task, whose cancellation is over then."""
        if task not in self._lost:
            return False
        self._lost.discard(task)
        return task.uncancel() == 0

    def _cancel(self) -> None:
        late = [task for task, since in self._since.items() if since < time.monotonic() - self.seconds]
        for task in late:
            if task not in self._lost:
                self._lost.add(task)
                task.cancel()
        loop = asyncio.get_running_loop()
        self._look = loop.call_later(self.seconds / 4, self._cancel) if self._since else None


class HttpDoor:
    """An HTTP server for the gateway's application."""

    def __init__(self, app: ASGIApp, spec: GatewaySpec):
        config = uvicorn.Config(
            _with_request_id(app),
            http=connection(spec, most_connections()),
            ws="none",
            log_level="error",
            lifespan="off",
            server_header=False,
            timeout_keep_alive=75,
        )
        self._server = uvicorn.Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def open(self, host: str, port: int) -> int:
        """Returns the port, any where 0 was given. Raises OSError where it is not to be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family is socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind((host, port))
        self._serving = asyncio.create_task(self._server.serve([listening]))
        while not self._server.started:
            await asyncio.sleep(0.01)
        return int(listening.getsockname()[1])

    async def close(self, grace_s: float) -> None:
        """Takes no new requests; those under way may end within the grace."""
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s)) if grace_s else None
        self._server.should_exit, self._server.force_exit = True, not grace_s
        if self._serving is not None:
            await self._serving


def _with_request_id(app: ASGIApp) -> ASGIApp:
    """Each response names the request that it answers: the client's x-request-id, or one that is made here."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex
        MutableHeaders(scope=scope)["x-request-id"] = request_id

        async def send_named(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await app(scope, receive, send_named)

    return named


def any_address() -> str:
    """All of this machine's, of IPv4 and IPv6."""
    return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
