"""What clients can do to a gateway's ports, by intent or by accident: everybody else is served all the same."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import (
    inference_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
)
from protos.inference import grpc_service_pb2, grpc_service_pb2_grpc
from serving.config import GatewaySpec
from serving.gateway import connection, doors
from serving.gateway.http import make_app
from tests import tiny
from tests.gateway.harness import House, house
from tests.gateway.ingress import grpc_port, http_port, patient  # noqa: F401  (used by being here)

PATIENCE_S = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def served(folder: Path, **spec: object) -> AsyncIterator[tuple[House, int]]:
    """With an HTTP port."""
    gateway = GatewaySpec.model_validate({"reader_patience_s": PATIENCE_S, **spec})
    async with house(folder, gateway=gateway) as h:
        app = make_app(h.requests, h.fleet, gateway, h.metrics)
        async with http_port(app, **gateway.model_dump()) as url:
            yield h, int(url.rpartition(":")[2])


def post(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}"
    return head.encode() + b"\r\n\r\n" + body


def stream(tokens: int) -> bytes:
    ask = {"prompt": "def f", "max_tokens": tokens, "ignore_eos": True, "stream": True, "return_tokens": True}
    return post(json.dumps(ask).encode())


async def said(port: int, data: bytes, within_s: float = 10) -> bytes:
    """All that is answered until the connection ends, which the other side does within the time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), within_s)
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


async def until_idle(h: House, within_s: float) -> None:
    until = time.monotonic() + within_s
    while h.requests._open or h.replicas[0]._engine.busy:
        assert time.monotonic() < until, "a request is still open"
        await asyncio.sleep(0.01)


async def test_who_does_not_read_events_is_not_waited_for(folder: Path) -> None:
    async with served(folder) as (h, port):
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, stream(100_000))
            while not h.requests._open:
                await asyncio.sleep(0.01)
            await until_idle(h, 30)
        await h.idle()


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nx: ", post(b"{", 500)], ids=["nothing", "half a head", "half a body"]
)
async def test_a_request_has_to_come(folder: Path, sent: bytes) -> None:
    async with served(folder) as (h, port):
        started = time.monotonic()
        assert await said(port, sent) == b""
        assert time.monotonic() - started > PATIENCE_S / 2
        await h.idle()


async def test_a_body_that_gets_on_may_take_its_time(folder: Path) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "u" * (1 << 18)}).encode()
    async with served(folder) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b"", len(body)))
        for start in range(0, len(body), 1 << 16):
            writer.write(body[start : start + (1 << 16)])
            await asyncio.sleep(PATIENCE_S / 2)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.transport.abort()


async def test_a_long_body_that_comes_with_its_head_is_no_head(folder: Path) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "u" * 200_000}).encode()
    async with served(folder, reader_patience_s=30) as (_, port):
        whole = post(body).replace(b"host: x", b"host: x\r\nconnection: close")
        assert (await said(port, whole)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "head",
    [b"x: " + b"a" * (4 << 20), b"x: y\r\n" * 400_000, b"x: " + b"a" * (4 << 20) + b"\r\n\r\n"],
    ids=["one", "many", "one, with its end"],
)
async def test_a_head_without_end_is_cut(folder: Path, head: bytes) -> None:
    async with served(folder, reader_patience_s=30) as (_, port):
        answer = await said(port, b"GET /healthz HTTP/1.1\r\n" + head)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431")


async def test_a_client_that_asks_for_more_and_goes_is_missed(folder: Path) -> None:
    async with served(folder, reader_patience_s=30) as (h, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(stream(100_000) + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readline()
        assert h.requests._open == 1
        wire = writer.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await until_idle(h, 2)
        assert (await said(port, stream(2) + b"GET /healthz HTTP/1.1\r\n\r\n")).endswith(
            b"[DONE]\n\n\r\n0\r\n\r\n"
        )


async def test_too_many_connections_are_refused_and_the_others_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "most_connections", lambda: 20)
    async with served(folder, reader_patience_s=2) as (h, port), grpc_port(h.rpc) as address:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        assert await said(port, b"GET /healthz HTTP/1.1\r\n\r\n", 1) == b""
        await asyncio.gather(
            *(asyncio.wait_for(reader.read(), 10) for reader, _ in held)
        )  # none came with a request
        assert (await said(port, b"GET /healthz HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200")
        grpc_held = [await asyncio.open_connection(*address.split(":")) for _ in range(40)]
        ended = [asyncio.create_task(reader.read(1)) for reader, _ in grpc_held]
        await asyncio.sleep(1)
        assert sum(task.done() and not task.exception() and task.result() == b"" for task in ended) >= 10
        for task in ended:
            task.cancel()
        for _, writer in [*held, *grpc_held]:
            writer.transport.abort()


def test_a_vanished_client_is_the_kernels_to_find() -> None:
    with socket.socket() as wire:

        class Transport:
            def get_extra_info(self, name: str) -> socket.socket:
                return wire

        connection._watch_over(Transport(), 30)  # type: ignore[arg-type]
        assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.parametrize(
    "name", ["x" * 1_000_000, "ü" * 9000, "\0" * 9000, "../../etc/passwd", "/etc/passwd"]
)
async def test_a_name_however_long_has_its_status(folder: Path, tmp_path: Path, name: str) -> None:
    async with (
        house(folder, gateway=GatewaySpec(state_store=str(tmp_path / "store"))) as h,
        grpc_port(h.rpc) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        sessions, inference = (
            sessions_pb2_grpc.SessionsStub(channel),
            inference_pb2_grpc.InferenceStub(channel),
        )
        for call in (
            sessions.Get(sessions_pb2.GetSessionRequest(session_id=name)),
            sessions.Restore(sessions_pb2.RestoreSessionRequest(snapshot_id=name)),
            inference.Score(pb.ScoreRequest(text="abc", model=name)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await call
            assert told.value.code() is grpc.StatusCode.NOT_FOUND


async def test_open_streams_that_ask_for_nothing_are_bounded(folder: Path) -> None:
    async with (
        house(folder, gateway=GatewaySpec(max_streams=3)) as h,
        grpc_port(h.rpc) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        held = [stub.ModelStreamInfer() for _ in range(3)]
        await asyncio.sleep(0.2)
        refused = stub.ModelStreamInfer()
        assert await asyncio.wait_for(refused.code(), 5) is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in held:
            assert not call.done()
            call.cancel()
        await asyncio.sleep(0.2)
        last = stub.ModelStreamInfer()
        await asyncio.sleep(0.2)
        assert not last.done()
        last.cancel()


@pytest.mark.parametrize(("field", "client"), [(None, 30.0), (60.0, 30.0), (20.0, 30.0), (20.0, None)])
async def test_the_engine_is_told_of_the_sooner_of_two_deadlines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, field: float | None, client: float | None
) -> None:
    """A request's field, and the deadline of the call: depth that keeps to a deadline has to know it."""
    async with (
        house(folder) as h,
        grpc_port(h.rpc) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        (replica,), told = h.replicas, []
        submit, clock = replica._loop.submit, replica._engine.clock
        monkeypatch.setattr(
            replica._loop, "submit", lambda r: (told.append((r.deadline or 0) - clock()), submit(r))
        )
        sampling = pb.SamplingParams(max_tokens=2)
        stub = inference_pb2_grpc.InferenceStub(channel)
        forged = (("grpc-deadline", "1"),) if client is None else ()
        request = pb.GenerateRequest(text="def f", sampling=sampling, timeout_s=field)
        async for _ in stub.Generate(request, timeout=client, metadata=forged):
            pass
        await stub.Score(pb.ScoreRequest(text="def f", timeout_s=field), timeout=client)
        given = {} if field is None else {"timeout_s": grpc_service_pb2.InferParameter(double_param=field)}
        infer = grpc_service_pb2.ModelInferRequest(model_name=folder.name, parameters=given)
        infer.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"d")
        await grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(infer, timeout=client)
        sooner = min(given for given in (field, client) if given is not None)
        assert told == [pytest.approx(sooner, abs=8)] * 3 and max(told) <= sooner + 0.1


async def test_a_clients_own_deadline_frees_the_slot(folder: Path) -> None:
    ids = [i % 290 + 1 for i in range(60_000)]
    async with (
        house(folder) as h,
        grpc_port(h.rpc) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = pb.SamplingParams(max_tokens=100_000, ignore_eos=True)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            async for _ in stub.Generate(pb.GenerateRequest(text="def f", sampling=sampling), timeout=0.5):
                pass
        assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until_idle(h, 1)
        score = stub.Score(pb.ScoreRequest(tokens=pb.TokenIds(ids=ids)))
        while not h.requests._open:
            await asyncio.sleep(0.001)
        score.cancel()
        await until_idle(h, 1)


async def test_a_full_gateway_refuses_all_work_and_answers_the_rest(folder: Path) -> None:
    gateway = GatewaySpec(max_streams=1)
    async with (
        house(folder, gateway=gateway) as h,
        grpc_port(h.rpc) as address,
        http_port(make_app(h.requests, h.fleet, gateway, h.metrics)) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = pb.SamplingParams(max_tokens=100_000, ignore_eos=True)
        held = stub.Generate(pb.GenerateRequest(text="def f", sampling=sampling))
        await held.read()
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await stub.Score(pb.ScoreRequest(text="abc"))
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        infer = grpc_service_pb2.ModelInferRequest(model_name="tiny")
        infer.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(infer)
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 429
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 429

        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="fathom.v1.Inference")
        serving = health_pb2.HealthCheckResponse.SERVING
        assert (await health.Check(asked)).status == serving
        watch = health.Watch(asked)
        assert (await watch.read()).status == serving
        watch.cancel()
        listed = await models_pb2_grpc.ModelsStub(channel).List(models_pb2.ListModelsRequest())
        assert [model.name for model in listed.models] == ["tiny"]
        for path in ("/healthz", "/v1/models", "/metrics"):
            assert (await client.get(path)).status_code == 200
        held.cancel()
        await until_idle(h, 1)
