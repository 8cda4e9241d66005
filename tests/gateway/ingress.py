"""A gateway behind real ports, without Ray: grpc.aio calls its methods as Ray Serve's ingress does, uvicorn its HTTP
application."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
import uvicorn
from fastapi import FastAPI

from serving.gateway import replicas
from serving.gateway.rpc import Rpc, StreamEndedError
from serving.gateway.services import Call, add_services, services


class Ingress:
    """A servicer with a method for each RPC, by its bare name."""

    def __init__(self, rpc: Rpc):
        self._rpc = rpc
        self._methods = {m.name: (s.full_name, m) for s in services() for m in s.methods}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        service, method = self._methods[name]

        async def unary(call: Call, context: Any) -> bytes:
            return (await self._rpc.unary(call, context)).SerializeToString()

        async def stream(call: Call, context: Any) -> AsyncIterator[bytes]:
            with suppress(StreamEndedError):
                async for message in self._rpc.stream(call, context):
                    yield message.SerializeToString()

        async def exchange(calls: AsyncIterator[Call], context: Any) -> AsyncIterator[bytes]:
            with suppress(StreamEndedError):
                async for message in self._rpc.exchange(service, name, calls, context):
                    yield message.SerializeToString()

        return exchange if method.client_streaming else stream if method.server_streaming else unary


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """For the modules that import it. Replica, gateway and test share one event loop, and what a test does itself
    holds it up: silence says nothing of a replica here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "SILENCE_S", 60.0)
        yield


@asynccontextmanager
async def grpc_port(rpc: Rpc) -> AsyncIterator[str]:
    """Its address, host:port."""
    server = grpc.aio.server()
    add_services(Ingress(rpc), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


@asynccontextmanager
async def http_port(app: FastAPI) -> AsyncIterator[str]:
    """Its address, http://host:port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve([listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await task
