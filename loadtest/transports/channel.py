"""gRPC calls over a few HTTP/2 connections."""

import asyncio
import os
import ssl
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, cast
from urllib.parse import unquote

from loadtest import http2
from loadtest.config import Server
from loadtest.errors import FlagError, TargetError
from loadtest.http2 import CANCEL, END_HEADERS, HEADERS, PREFACE, RST_STREAM, Http2, frame

STATUS: Final = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]
CONNECT_TIMEOUT = 5.0  # seconds
# What a reset stream and a bare HTTP status stand for: gRPC's PROTOCOL-HTTP2 and http-grpc-status-mapping.
_RESET = {7: "UNAVAILABLE", 8: "CANCELLED", 11: "RESOURCE_EXHAUSTED", 12: "PERMISSION_DENIED"}
_HTTP = {400: "INTERNAL", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "UNIMPLEMENTED"}
_HTTP |= dict.fromkeys((429, 502, 503, 504), "UNAVAILABLE")


class Call(http2.Stream):
    """A call that reports its end. Derive from it to say what to do with the messages."""

    __slots__ = ("connection", "given_up")

    def __init__(self) -> None:
        super().__init__()
        self.connection: Connection | None = None  # until it has one, it waits
        self.given_up = False  # before that

    def on_end(self, now: float, status: str, detail: str) -> None:
        """The call is over, with the name of a gRPC status. Called once."""
        raise NotImplementedError

    def cancel(self, status: str, detail: str) -> None:
        """Give the call up, and end it here with this status."""
        if self.connection:
            self.connection.cancel(self, status, detail)
        elif not self.given_up:
            self.given_up = True
            self.on_end(time.perf_counter(), status, detail)


class Connection(Http2):
    """The client's end. `ready` is done when the server has sent its settings, or could not be spoken to."""

    def __init__(self) -> None:
        super().__init__()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.usable = False
        self._next = 1

    def close(self) -> None:
        self.usable = False
        self.transport.close()

    @property
    def free(self) -> bool:
        return self.usable and len(self.streams) < self.limit

    def call(self, call: Call, headers: bytes, message: bytes) -> None:
        """Open a stream with a block of :func:`http2.header_block` and its only message."""
        self.adopt(self._next, call)
        call.connection = self
        opening = frame(HEADERS, END_HEADERS, self._next, headers)
        self._next += 2
        if self._next > http2.LARGEST:
            self.usable = False  # no numbers left
        self.send(call, opening, http2.prefixed(message), end=True)

    def cancel(self, call: Call, status: str, detail: str) -> None:
        if call.number in self.streams and not self.transport.is_closing():
            self.transport.write(frame(RST_STREAM, 0, call.number, CANCEL.to_bytes(4, "big")))
        self._end(time.perf_counter(), call.number, status, detail)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(PREFACE)
        super().connection_made(transport)

    def buffer_updated(self, size: int) -> None:
        if not self.usable and not self.ready.done() and self._buffer.startswith(b"HTTP/"):
            self.on_broken(time.perf_counter(), "it answered in HTTP/1, so this is no gRPC port")
            self.transport.abort()
            return
        super().buffer_updated(size)

    def on_settings(self) -> None:
        if not self.ready.done():
            self.usable = True
            self.ready.set_result(None)

    def on_headers(self, now: float, number: int, fields: dict[bytes, bytes], ended: bool) -> None:
        if ended:
            self._end(now, number, *_status(fields))
        elif (http := fields.get(b":status", b"200")) != b"200":
            self._end(now, number, _HTTP.get(int(http), "UNKNOWN"), f"HTTP status {int(http)}")

    def on_data_end(self, now: float, number: int) -> None:
        self._end(now, number, "UNKNOWN", "the server closed the stream without a status")

    def on_reset(self, now: float, number: int, code: int) -> None:
        self._end(
            now, number, _RESET.get(code, "INTERNAL"), f"the server reset the stream: HTTP/2 error {code}"
        )

    def on_goaway(self, now: float, last: int) -> None:
        self.usable = False
        for number in [n for n in self.streams if n > last]:
            self._end(now, number, "UNAVAILABLE", "the server is going away")

    def on_broken(self, now: float, reason: str) -> None:
        self.usable = False
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(reason))
        for number in list(self.streams):
            self._end(now, number, "UNAVAILABLE", reason)

    def _end(self, now: float, number: int, status: str, detail: str) -> None:
        call = self.streams.pop(number, None)
        if call is not None:
            assert isinstance(call, Call)
            call.on_end(now, status, detail)


def _status(fields: dict[bytes, bytes]) -> tuple[str, str]:
    code = fields.get(b"grpc-status")
    if code is None:
        http = int(fields.get(b":status", b"200"))
        return _HTTP.get(http, "UNKNOWN"), f"HTTP status {http} and no grpc-status"
    name = STATUS[int(code)] if code.isdigit() and int(code) < len(STATUS) else "UNKNOWN"
    return name, unquote(fields.get(b"grpc-message", b"").decode())


class Channel:
    """Calls to one server, spread over connections that are opened again when they break."""

    def __init__(self, server: Server):
        self._server = server
        self._tls = tls_context(server)
        if self._tls:
            self._tls.set_alpn_protocols(["h2"])
        self._connections: list[Connection] = []
        self._opening: asyncio.Task[None] | None = None
        self._queue: deque[tuple[Call, bytes, bytes]] = deque()  # calls that wait for a connection
        self._turn = 0

    async def connect(self) -> None:
        """Open the connections. Raises TargetError once the server has not been reached for `server.wait`
        seconds."""
        deadline = time.monotonic() + self._server.wait
        while not self._connections:
            try:
                for _ in range(self._server.connections):
                    self._connections.append(await self._open())
            except (OSError, TimeoutError) as error:
                for connection in self._connections:
                    connection.close()
                self._connections.clear()
                if time.monotonic() >= deadline:
                    why = reason(error)
                    raise TargetError(
                        f"--target {self._server.target}: cannot be reached over gRPC: {why}"
                    ) from None
                await asyncio.sleep(min(0.2, max(0.0, deadline - time.monotonic())))

    def headers(self, method: str, extra: Sequence[tuple[str, str]] = ()) -> bytes:
        """The header block of every call to `method`, "/package.Service/Name"."""
        server = self._server
        pseudo = {
            ":method": "POST",
            ":scheme": "https" if server.secure else "http",
            ":path": method,
            ":authority": f"{server.host}:{server.port}",
        }
        plain = {"te": "trailers", "content-type": "application/grpc", "user-agent": "fathom-loadtest"}
        milliseconds = int(server.timeout * 1000)
        # The protocol allows eight digits.
        timeout = f"{milliseconds}m" if milliseconds < 10**8 else f"{min(milliseconds // 1000, 10**8 - 1)}S"
        fields = [*pseudo.items(), *plain.items(), ("grpc-timeout", timeout), *extra, *server.metadata]
        return http2.header_block(fields)

    def call(self, call: Call, headers: bytes, message: bytes) -> None:
        """Start a call. Where every connection is full or broken it waits for another to be opened."""
        connections = self._connections
        for _ in range(len(connections)):
            self._turn = (self._turn + 1) % len(connections)
            connection = connections[self._turn]
            if connection.free:
                connection.call(call, headers, message)
                return
        self._queue.append((call, headers, message))
        if self._opening is None or self._opening.done():
            self._opening = asyncio.ensure_future(self._open_more())

    async def unary(self, method: str, message: bytes) -> tuple[str, str, bytes]:
        """One request and one answer: status, detail, message."""
        ended: asyncio.Future[tuple[str, str, bytes]] = asyncio.get_running_loop().create_future()
        self.call(_Unary(ended), self.headers(method), message)
        return await asyncio.wait_for(ended, CONNECT_TIMEOUT)

    async def close(self) -> None:
        if self._opening:
            self._opening.cancel()
        for connection in self._connections:
            connection.close()
        await asyncio.sleep(0)

    async def _open(self) -> Connection:
        server = self._server
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, server.host, server.port, ssl=self._tls
            )
            await connection.ready
        return connection

    async def _open_more(self) -> None:
        """As long as calls wait."""
        while self._queue:
            self._connections = [c for c in self._connections if c.usable or c.streams]
            try:
                connection = await self._open()
            except (OSError, TimeoutError) as error:
                waiting, self._queue = self._queue, deque()
                for call, _, _ in waiting:
                    call.cancel("UNAVAILABLE", reason(error))
                return
            self._connections.append(connection)
            while self._queue and connection.free:
                call, headers, message = self._queue.popleft()
                if not call.given_up:
                    connection.call(call, headers, message)


class _Unary(Call):
    __slots__ = ("ended", "message")

    def __init__(self, ended: "asyncio.Future[tuple[str, str, bytes]]"):
        super().__init__()
        self.ended = ended
        self.message = b""

    def on_message(self, now: float, message: bytes) -> None:
        self.message = message

    def on_end(self, now: float, status: str, detail: str) -> None:
        if not self.ended.done():
            self.ended.set_result((status, detail, self.message))


def tls_context(server: Server) -> ssl.SSLContext | None:
    if not server.secure:
        return None
    try:
        context = ssl.create_default_context(cafile=server.ca_file)
        if server.cert_file:
            context.load_cert_chain(server.cert_file, server.key_file)
    except (ssl.SSLError, OSError) as error:
        raise FlagError(
            "--ca-file" if server.ca_file else "--cert-file", server.ca_file or server.cert_file, str(error)
        ) from None
    return context


def reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT:g} s"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0)
    return str(error) or type(error).__name__
