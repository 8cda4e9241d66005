"""A gateway's own doors, without Ray."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI

from serving.config import GatewaySpec
from serving.gateway import replicas
from serving.gateway.doors import GrpcDoor, HttpDoor
from serving.gateway.rpc import Rpc


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """For the modules that import it. Replica, gateway and test share one event loop, and what a test does itself
    holds it up: silence says nothing of a replica here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "SILENCE_S", 60.0)
        yield


@asynccontextmanager
async def grpc_port(rpc: Rpc, **spec: Any) -> AsyncIterator[str]:
    """Its address, host:port."""
    door = GrpcDoor(rpc, GatewaySpec(**spec))
    port = await door.open("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await door.close(0)


@asynccontextmanager
async def http_port(app: FastAPI, **spec: Any) -> AsyncIterator[str]:
    """Its address, http://host:port."""
    door = HttpDoor(app, GatewaySpec(**spec))
    port = await door.open("127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await door.close(0)
