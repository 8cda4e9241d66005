"""A gateway and an engine replica in one process: everything real but Ray."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from google.protobuf.message import Message

from serving.cluster.link import Entry
from serving.cluster.replica import EngineReplica
from serving.config import GatewaySpec, ModelSpec
from serving.gateway.fleet import Fleet
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.requests import Requests
from serving.gateway.rpc import Rpc, StreamEndedError
from serving.gateway.services import Call


@dataclass
class Context:
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    _trailing: Sequence[tuple[str, str | bytes]] = ()

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self._trailing = trailing_metadata

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self._trailing

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata


@dataclass
class House:
    fleet: Fleet
    requests: Requests
    rpc: Rpc
    metrics: GatewayMetrics
    replicas: list[EngineReplica] = field(default_factory=list)

    async def unary(self, method: str, request: Message | bytes) -> tuple[Message, Context]:
        context = Context()
        return await self.rpc.unary(call(method, request), context), context

    async def stream(self, method: str, request: Message | bytes) -> tuple[list[Message], Context]:
        context, messages = Context(), []
        try:
            async for message in self.rpc.stream(call(method, request), context):
                messages.append(message)  # noqa: PERF401  # those before an error are wanted, too
        except StreamEndedError:
            assert context.code is not grpc.StatusCode.OK
        return messages, context

    async def idle(self) -> None:
        """Until nothing runs; nothing may be left behind."""
        for _ in range(500):
            if not self.requests._open and not any(r._engine.busy or r._links for r in self.replicas):
                break
            await asyncio.sleep(0.01)
        for replica in self.replicas:
            assert replica._engine.load().running == replica._engine.load().waiting == 0
            assert not replica._links
        assert self.requests._open == 0


def call(method: str, request: Message | bytes) -> Call:
    """`method`: fathom.v1.Inference/Generate."""
    service, _, name = method.partition("/")
    return Call(service, name, request if isinstance(request, bytes) else request.SerializeToString())


@asynccontextmanager
async def house(
    *folders: Path, gateway: GatewaySpec | None = None, replicas: int = 1, **spec: object
) -> AsyncIterator[House]:
    """`replicas` for each checkpoint folder, served under the folder's name."""
    gateway = gateway or GatewaySpec()
    names = [folder.name for folder in folders]
    fleet = Fleet(names)
    metrics = GatewayMetrics("test")
    requests = Requests(fleet, gateway)
    made = House(fleet, requests, Rpc(requests, fleet, gateway, metrics), metrics)
    entries = []
    for number, folder in enumerate(folder for folder in folders for _ in range(replicas)):
        options = {"slots": 8, "dtype": "float32", **spec}
        model = ModelSpec.model_validate({"path": str(folder), "name": folder.name, **options})
        replica = await asyncio.to_thread(EngineReplica, model, f"r{number}", asyncio.get_running_loop())
        address = await replica.start("127.0.0.1")
        entries.append(Entry(f"r{number}", folder.name, address, replica.token))
        made.replicas.append(replica)
    fleet.update(entries)
    while len(fleet.replicas()) < len(entries):
        await asyncio.wait_for(fleet.changed(), 60)
    try:
        yield made
    finally:
        await fleet.close()
        for replica in made.replicas:
            await replica.stop()
