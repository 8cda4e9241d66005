"""The harness's HTTP/2 against gRPC's own, at either end."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from loadtest.config import Server
from loadtest.core import Model, Request, Sample, Sampling
from loadtest.errors import FlagError, TargetError
from loadtest.fake import Behaviour, serve
from loadtest.recorder import Recorder
from loadtest.run import drive
from loadtest.transports import transport
from loadtest.transports.fathom import FathomTransport
from protos.fathom.v1 import inference_pb2, inference_pb2_grpc
from tests.loadtest.servers import TINY, running
from tests.loadtest.virtual import a_run


def request(text: str = "x", max_tokens: int = 3, **fields: Any) -> Request:
    return Request(
        **{
            "text": text,
            "tokens": None,
            "max_tokens": max_tokens,
            "sampling": Sampling(),
            "seed": 0,
            **fields,
        }
    )


async def ask(chosen: Any, *requests: Request, keep: bool = False) -> list[Sample]:
    """Send them all at once and wait for all of them."""
    samples = [Sample(0.0, r.max_tokens, keep=keep) for r in requests]
    ended = asyncio.Semaphore(0)
    for r, sample in zip(requests, samples, strict=True):
        chosen.send(chosen.encode(r), sample, lambda _: ended.release())
    for _ in samples:
        await asyncio.wait_for(ended.acquire(), 20)
    return samples


Connect = Callable[..., Any]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    opened: list[Any] = []

    async def connected(target: str, **flags: Any) -> Any:
        chosen = transport(Server.read({"target": target, **flags}))
        opened.append(chosen)
        await chosen.connect()
        return chosen

    yield connected
    for chosen in opened:
        await chosen.close()


async def test_tokens_text_usage_and_metadata(connect: Connect) -> None:
    async with running(TINY) as (inference, target):
        chosen = await connect(target, header=("X-Team=blue",), api_key="secret", timeout=30)
        (sample,) = await ask(chosen, request(tokens=[5, 6], request_id="r1", session_id="s1"), keep=True)
    assert (sample.status, sample.counts, sample.tokens, sample.text) == ("OK", [1, 1, 1], [1, 2, 3], "yyy")
    assert sample.stamps == sorted(sample.stamps) and sample.stamps[-1] <= sample.end
    assert (sample.prompt_tokens, sample.cached_tokens, sample.mean_depth) == (2, 1, 1.5)
    sent = inference.requests[0]
    assert (list(sent.tokens.ids), sent.request_id, sent.session_id, sent.timeout_s) == (
        [5, 6],
        "r1",
        "s1",
        30,
    )
    metadata = inference.metadata[0]
    assert (metadata["x-team"], metadata["authorization"]) == ("blue", "Bearer secret")


@pytest.mark.parametrize(
    ("text", "status", "detail", "tokens"),
    [
        ("fail", "RESOURCE_EXHAUSTED", "the queue is full: 100 % of it", 0),
        ("break", "INTERNAL", "broke in mid-stream", 2),
    ],
)
async def test_failures_keep_status_detail_and_what_had_come(
    connect: Connect, text: str, status: str, detail: str, tokens: int
) -> None:
    async with running(TINY) as (_, target):
        (sample,) = await ask(await connect(target), request(text))
    assert (sample.status, sample.detail, sum(sample.counts)) == (status, detail, tokens)


async def test_large_messages_pass_flow_control_both_ways(connect: Connect) -> None:
    async with running(TINY) as (inference, target):
        chosen = await connect(target, connections=1)
        prompts = [
            request(tokens=list(range(1, 100)) * 2000) for _ in range(4)
        ]  # some 200 kB each: three windows
        samples = await ask(chosen, *prompts, request("big", max_tokens=20))
    assert [sample.status for sample in samples] == ["OK"] * 5
    assert [len(r.tokens.ids) for r in inference.requests if r.text != "big"] == [198_000] * 4


async def test_many_streams_and_a_server_that_limits_them(connect: Connect) -> None:
    async with running(TINY, max_concurrent_streams=3) as (inference, target):
        chosen = await connect(target, connections=1)
        samples = await ask(chosen, *[request(max_tokens=5) for _ in range(20)])
    assert [sample.counts for sample in samples] == [[1] * 5] * 20
    assert len(inference.requests) == 20


async def test_cancelling_tells_the_server_and_ends_the_call_here(connect: Connect) -> None:
    async with running(TINY) as (inference, target):
        chosen = await connect(target)
        sample = Sample(0.0, 3)
        ended = asyncio.Event()
        handle = chosen.send(chosen.encode(request("hang")), sample, lambda _: ended.set())
        while not inference.requests:
            await asyncio.sleep(0)
        handle.cancel("DEADLINE_EXCEEDED", "too long")
        handle.cancel("DEADLINE_EXCEEDED", "a second time does nothing")
        assert ended.is_set() and (sample.status, sample.detail) == ("DEADLINE_EXCEEDED", "too long")
        await asyncio.wait_for(inference.cancelled.wait(), 20)


async def test_streams_end_when_the_server_dies_and_new_ones_reach_its_successor(connect: Connect) -> None:
    async with running(TINY) as (inference, target):
        chosen = await connect(target)
        sample = Sample(0.0, 3)
        ended = asyncio.Event()
        chosen.send(chosen.encode(request("hang")), sample, lambda _: ended.set())
        while not inference.requests:
            await asyncio.sleep(0)
    await asyncio.wait_for(ended.wait(), 20)
    assert sample.status == "UNAVAILABLE"
    (refused,) = await ask(chosen, request())
    assert refused.status == "UNAVAILABLE" and "refused" in refused.detail.lower()
    async with running(TINY, port=int(target.rpartition(":")[2])):
        (again,) = await ask(chosen, request())
    assert again.status == "OK"


async def test_the_model_and_its_limits(connect: Connect) -> None:
    other = type(TINY)(name="other")
    async with running(TINY) as (_, target):
        found = await FathomTransport(Server.read({"target": target})).connect()
        assert found == Model("tiny", vocab_size=100, max_tokens=1000, eos_token_ids=(0,))
        with pytest.raises(FlagError, match="--model small: must be one of tiny"):
            await connect(target, model="small")
    async with running(TINY, other) as (_, target):
        with pytest.raises(FlagError, match="--model: must be one of other, tiny"):
            await connect(target)
    async with running() as (_, target):  # a server without the Models service
        assert (await ask(await connect(target), request()))[0].status == "OK"


async def test_what_cannot_be_reached(connect: Connect, unused_tcp_port: int) -> None:
    with pytest.raises(
        TargetError, match=rf"--target localhost:{unused_tcp_port}: cannot be reached .*refused"
    ):
        await connect(f"localhost:{unused_tcp_port}")

    async def answer_in_http1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer_in_http1, "localhost", unused_tcp_port):
        with pytest.raises(TargetError, match=r"answered in HTTP/1"):
            await connect(f"localhost:{unused_tcp_port}")


async def test_the_fake_server_speaks_to_grpc_itself() -> None:
    fake, server = await serve(Behaviour(ttft=0.0, itl=0.0, fail_every=3))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        asked = inference_pb2.GenerateRequest(
            text="a b c", sampling=inference_pb2.SamplingParams(max_tokens=4000)
        )
        responses = [response async for response in stub.Generate(asked)]
        assert sum(len(response.token_ids) for response in responses) == 4000
        assert responses[-1].usage.prompt_tokens == 3
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await stub.Score(inference_pb2.ScoreRequest())
        assert missing.value.code() == grpc.StatusCode.UNIMPLEMENTED
        await anext(aiter(stub.Generate(asked)))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await anext(aiter(stub.Generate(asked)))
        assert failed.value.code() == grpc.StatusCode.INTERNAL
    server.close()
    fake.clock.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
async def test_tls_checks_the_servers_certificate_and_shows_its_own(connect: Connect, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    pair = (key.read_bytes(), certificate.read_bytes())
    mutual = grpc.ssl_server_credentials([pair], root_certificates=pair[1], require_client_auth=True)
    async with running(TINY, credentials=mutual) as (_, target):
        own = {"cert_file": certificate, "key_file": key}
        chosen = await connect(target, tls=True, ca_file=certificate, **own)
        assert (await ask(chosen, request()))[0].status == "OK"
        with pytest.raises(TargetError, match="CERTIFICATE_VERIFY_FAILED"):
            await connect(target, tls=True, **own)
        with pytest.raises(TargetError, match="cannot be reached"):
            await connect(target)


async def test_a_fault_of_the_harness_ends_the_run(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(TINY) as (_, target):
        chosen = await connect(target)
        monkeypatch.setattr(Recorder, "add", lambda self, sample: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(
                drive(a_run(requests=3, max_tokens=3), chosen, Model("tiny"), progress=False), 20
            )
