"""An HTTP/1.1 client that stamps bytes as they are read, like http2.py. The library httptools parses them."""

import asyncio
import time
from collections.abc import Iterable
from typing import cast

import httptools

from loadtest.config import Server
from loadtest.transports.channel import CONNECT_TIMEOUT, reason, tls_context


class Exchange:
    """A request and its answer. Derive from it to say what to do with the answer."""

    def __init__(self, request: bytes):
        self.request = request
        self.status = 0  # HTTP's, once it is known
        self.connection: Connection | None = None
        self.ended = False

    def on_body(self, now: float, data: bytes) -> None:
        """Part of the answer's body was read from the socket at `now` (time.perf_counter, seconds)."""
        raise NotImplementedError

    def on_end(self, now: float, failure: str) -> None:
        """The answer is complete, or `failure` says why it will not be. Called once."""
        raise NotImplementedError

    def end(self, now: float, failure: str = "") -> None:
        if not self.ended:
            self.ended = True
            self.on_end(now, failure)

    def abandon(self) -> None:
        """Want no more of it: its connection cannot serve another."""
        self.ended = True
        if self.connection:
            self.connection.transport.abort()


class Connection(asyncio.Protocol):
    """Serves one exchange at a time."""

    def __init__(self, client: "Client"):
        self.transport = cast("asyncio.Transport", None)  # until connection_made
        self._client = client
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._answered = False  # this exchange, with a byte at least
        self._used = False  # by an exchange before this one

    def start(self, exchange: Exchange) -> None:
        self._exchange, exchange.connection = exchange, self
        self._answered = False
        self.transport.write(exchange.request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"it does not answer in HTTP/1.1: {error}")
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._client.forget(self)
        exchange = self._exchange
        if exchange and self._used and not self._answered and not exchange.ended:
            # The server closed an idle connection just as it was taken up again: no failure of the request.
            self._exchange = None
            self._client.send(exchange, fresh=True)
        else:
            self._fail(f"connection lost{f': {error}' if error else ''}")

    # -- httptools -------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        if self._exchange:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._exchange and not self._exchange.ended:
            self._exchange.on_body(self._now, data)

    def on_message_complete(self) -> None:
        exchange, self._exchange = self._exchange, None
        keep = self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        self._used = True
        if keep:
            self._client.release(self)
        else:
            self.transport.close()
        if exchange:
            exchange.end(self._now)

    def _fail(self, failure: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange:
            exchange.end(time.perf_counter(), failure)


class Client:
    """As many connections to one server as there are exchanges under way."""

    def __init__(self, server: Server):
        self._server = server
        self._tls = tls_context(server)
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request."""
        server = self._server
        host = f"[{server.host}]" if ":" in server.host else server.host
        fields: Iterable[tuple[str, str]] = (
            ("host", f"{host}:{server.port}"),
            ("user-agent", "fathom-loadtest"),
            ("accept", "*/*"),
            *((("content-type", "application/json"), ("content-length", str(len(body)))) if body else ()),
            *server.metadata,
        )
        head = "".join(f"{name}: {value}\r\n" for name, value in fields)
        return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body

    async def connect(self) -> None:
        """Open the first connections. Raises OSError or TimeoutError."""
        self._idle += [await self._open() for _ in range(self._server.connections)]

    def send(self, exchange: Exchange, fresh: bool = False) -> None:
        """Over an idle connection, or a new one."""
        if self._idle and not fresh:
            self._idle.pop().start(exchange)
            return
        task = asyncio.ensure_future(self._open_for(exchange))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def release(self, connection: Connection) -> None:
        """It is free for another exchange."""
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    async def close(self) -> None:
        for task in list(self._opening):
            task.cancel()
        for connection in list(self._idle):
            connection.transport.close()
        await asyncio.sleep(0)

    async def _open_for(self, exchange: Exchange) -> None:
        try:
            connection = await self._open()
        except (OSError, TimeoutError) as error:
            exchange.end(time.perf_counter(), reason(error))
            return
        if exchange.ended:
            self.release(connection)  # it was abandoned meanwhile
        else:
            connection.start(exchange)

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, connection = await loop.create_connection(
                lambda: Connection(self), self._server.host, self._server.port, ssl=self._tls
            )
        return connection
