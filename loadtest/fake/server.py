"""One port for gRPC and HTTP."""

import asyncio
from typing import cast

from loadtest.clock import LoopClock
from loadtest.fake.grpc import GrpcEnd, Method, methods
from loadtest.fake.http import HttpEnd
from loadtest.fake.source import Behaviour, Fake
from loadtest.http2 import PREFACE


class _Either(asyncio.Protocol):
    """Looks at the first bytes of a connection and hands it on."""

    def __init__(self, fake: Fake, served: dict[bytes, Method]):
        self._fake = fake
        self._served = served
        self._seen = b""
        self._transport = cast("asyncio.Transport", None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if PREFACE.startswith(self._seen[: len(PREFACE)]) and len(self._seen) < len(PREFACE):
            return
        if self._seen.startswith(PREFACE):
            grpc = GrpcEnd(self._served)
            self._transport.set_protocol(grpc)
            grpc.connection_made(self._transport)
            grpc.feed(self._seen[len(PREFACE) :])
        else:
            http = HttpEnd(self._fake)
            self._transport.set_protocol(http)
            http.connection_made(self._transport)
            http.data_received(self._seen)


async def serve(behaviour: Behaviour, host: str = "127.0.0.1", port: int = 0) -> tuple[Fake, asyncio.Server]:
    """A running server, and its state. Port 0 takes a free one."""
    fake = Fake(behaviour, LoopClock())
    served = methods(fake)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Either(fake, served), host, port, backlog=1024
    )
    return fake, server
