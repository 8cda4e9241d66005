"""One HTTP connection of a client, bounded in what it may hold and for how long."""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.config import GatewaySpec

HEAD_BYTES = 1 << 16
"""Of a request's first line and headers together."""

PROGRESS_BYTES = 1 << 16
"""Of a body, after which its client is given `reader_patience_s` once more."""

HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)


def connection(spec: GatewaySpec, most: int) -> type[asyncio.Protocol]:
    """What uvicorn is to make of each connection, of `most` at a time."""

    class Bounded(_Connection):
        patience_s = spec.reader_patience_s
        most_connections = most

    return Bounded


class _Connection(HttpToolsProtocol):
    """A request has to come within `patience_s`, and what is sent has to be read; who takes longer is let go."""

    patience_s: float
    most_connections: int

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._asking: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._in_head, self._head, self._progress = False, 0, 0
        self._deaf = False  # to what comes after a request that is being answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
            return
        _watch_over(transport, self.patience_s)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        super().data_received(data)
        if self._in_head and not self._deaf:
            self._head += len(data)
            if self._head > HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(HEAD_TOO_LARGE)
                self.transport.close()
                self._deaf = True

    def on_message_begin(self) -> None:
        # One request at a time. uvicorn would let others wait behind it, and then not tell it that its client has
        # gone. Clients send again what has no answer when the connection ends.
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self._deaf = True
            return
        super().on_message_begin()
        self._in_head, self._head, self._progress = True, 0, 0
        self._expect_request()

    def on_url(self, url: bytes) -> None:
        if not self._deaf:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._deaf and self._in_head:  # what trails a body means nothing here
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._deaf:
            self._in_head = False
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._deaf:
            return
        self._progress += len(body)
        if self._progress >= PROGRESS_BYTES:
            self._progress = 0
            self._expect_request()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._deaf:
            return
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _expect_request(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._asking = self.loop.call_later(self.patience_s, self.transport.abort)


def _watch_over(transport: asyncio.Transport, patience_s: float) -> None:
    """Let the kernel end the connection of a client that has vanished without a word, or takes nothing."""
    wire = transport.get_extra_info("socket")
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 20),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", max(1, int(patience_s * 1000))),
    ):
        if hasattr(socket, name):  # Linux
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
