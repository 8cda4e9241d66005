"""A gateway's own ports: what gRPC and HTTP add to what the gateway says."""

import asyncio
import json
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc
from serving.config import GatewaySpec, ServeConfig
from serving.gateway.doors import GrpcDoor, HttpDoor
from serving.gateway.http import make_app
from serving.gateway.replicas import Replica
from serving.gateway.services import services
from tests import tiny
from tests.gateway.harness import house
from tests.gateway.ingress import grpc_port, http_port, patient  # noqa: F401  (used by being here)

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def ask(tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return pb.GenerateRequest(text="def f", sampling=sampling)


async def test_who_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "tiny")
    small = [*OWN_CONNECTION, ("grpc.http2.bdp_probe", 0)]  # the window of what is under way does not grow
    async with house(folder) as h, grpc_port(h.rpc, reader_patience_s=0.5) as address:
        with grpc.insecure_channel(address, small) as channel:  # reads only when it is asked to
            call = inference_pb2_grpc.InferenceStub(channel).Generate(ask(100_000))
            first = await asyncio.to_thread(next, call)
            assert first.token_ids
            for _ in range(600):
                if not h.requests._open:
                    break
                await asyncio.sleep(0.05)
            assert h.requests._open == 0
            with pytest.raises(grpc.RpcError) as told:
                await asyncio.to_thread(list, call)
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "reader_patience_s = 0.5" in str(told.value.details())
        await h.idle()


async def test_a_client_that_retries_comes_back_when_it_was_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {
        "maxAttempts": 3, "initialBackoff": "60s", "maxBackoff": "60s", "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }  # fmt: skip
    config = {"methodConfig": [{"name": [{"service": "fathom.v1.Inference"}], "retryPolicy": policy}]}
    options = [*OWN_CONNECTION, ("grpc.service_config", json.dumps(config))]
    async with house(tiny.checkpoint(tmp_path / "tiny")) as h, grpc_port(h.rpc) as address:
        refused = asyncio.Event()
        with monkeypatch.context() as full:
            full.setattr(Replica, "room", 0)
            full.setattr(Replica, "refuse", lambda self: refused.set())
            channel = grpc.aio.insecure_channel(address, options)
            answers = inference_pb2_grpc.InferenceStub(channel).Generate(ask(3))
            reading = asyncio.ensure_future(anext(aiter(answers)))
            await refused.wait()
        assert (await asyncio.wait_for(reading, 20)).token_ids  # and not after its own backoff of a minute
        await channel.close()


async def test_several_gateways_share_a_port_and_one_may_go(tmp_path: Path) -> None:
    async with house(tiny.checkpoint(tmp_path / "tiny")) as h:
        doors = [GrpcDoor(h.rpc, GatewaySpec()), GrpcDoor(h.rpc, GatewaySpec())]
        port = await doors[0].open("127.0.0.1", 0)
        assert await doors[1].open("127.0.0.1", port) == port
        app = make_app(h.requests, h.fleet, GatewaySpec(), h.metrics)
        pages = [HttpDoor(app, GatewaySpec()), HttpDoor(app, GatewaySpec())]
        page = await pages[0].open("127.0.0.1", 0)
        assert await pages[1].open("127.0.0.1", page) == page
        await asyncio.gather(doors[0].close(0), pages[0].close(0))
        for _ in range(5):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION) as channel:
                stream = inference_pb2_grpc.InferenceStub(channel).Generate(ask(3))
                assert sum([len(m.token_ids) async for m in stream]) == 3
            async with httpx.AsyncClient(timeout=60) as client:
                assert (await client.get(f"http://127.0.0.1:{page}/healthz")).status_code == 200
        await asyncio.gather(doors[1].close(0), pages[1].close(0))


async def test_what_is_too_long_is_told_by_the_gateway(tmp_path: Path) -> None:
    limit = {"max_message_mb": 0.1}
    async with (
        house(tiny.checkpoint(tmp_path / "tiny"), gateway=GatewaySpec(**limit)) as h,
        grpc_port(h.rpc, **limit) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="at most 104857 are taken"):
            await inference_pb2_grpc.InferenceStub(channel).Score(pb.ScoreRequest(text="a" * 200_000))


async def test_it_tells_its_services(tmp_path: Path) -> None:
    async with house(tiny.checkpoint(tmp_path / "tiny")) as h, grpc_port(h.rpc) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            async for answer in stub.ServerReflectionInfo(iter([question])):
                listed = {service.name for service in answer.list_services_response.service}
        assert {s.full_name for s in services()} < listed


async def test_a_response_names_its_request(tmp_path: Path) -> None:
    async with (
        house(tiny.checkpoint(tmp_path / "tiny")) as h,
        http_port(make_app(h.requests, h.fleet, GatewaySpec(), h.metrics)) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        body = {"prompt": "a", "max_tokens": 2}
        given = await client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        made = await client.post("/v1/completions", json=body)
    assert given.headers["x-request-id"] == "mine" and given.json()["id"] == "cmpl-mine"
    assert made.json()["id"] == "cmpl-" + made.headers["x-request-id"]


def test_a_cluster_elsewhere_has_proxies() -> None:
    assert ServeConfig.parse({}, "test").ingress == "direct"
    assert ServeConfig.parse({"ray_address": "auto"}, "test").ingress == "proxy"
    assert ServeConfig.parse({"ray_address": "auto", "ingress": "direct"}, "test").ingress == "direct"
