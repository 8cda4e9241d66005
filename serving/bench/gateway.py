"""``fathom bench gateway``: the same load in-process and through gRPC, and how many messages a second get through."""

import asyncio
import statistics
import tempfile
import threading
import time
from pathlib import Path

import grpc

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc
from serving.bench.measure import report
from serving.cluster.local import running
from serving.config import ModelSpec, ServeConfig
from serving.engine.build import build
from serving.engine.core import Request
from serving.engine.loop import EngineLoop
from serving.engine.news import News
from serving.engine.params import SamplingParams

PROMPT = [1, 2, 3, 4]


def run(
    model: str, requests: int, streams: int, tokens: int, ingress: str, grpc_port: int, http_port: int
) -> None:
    """Latency: one request of one token at a time, from call to answer. Throughput: `streams` streams of `tokens`
    tokens at once, on a model so small that the way to the client is what limits."""
    inside = in_process(model, requests)
    options = {"grpc_port": grpc_port, "http_port": http_port, "ingress": ingress}
    with tempfile.TemporaryDirectory() as folder:
        nothing = tiny(Path(folder))
        config = ServeConfig.parse(
            {"models": [model, {"path": str(nothing), "slots": streams}], **options}, "bench"
        )
        with running(config):
            target, name = f"localhost:{grpc_port}", config.models[0].name
            outside = asyncio.run(through_grpc(target, name, requests))
            rate, token_rate = asyncio.run(flood(target, nothing.name, streams, tokens))
    added = 1e3 * (statistics.median(outside) - statistics.median(inside))
    report(
        f"{model}, ingress {ingress}",
        ("", "in-process", "through gRPC"),
        (
            (
                "p50 of one token, ms",
                f"{1e3 * statistics.median(inside):.2f}",
                f"{1e3 * statistics.median(outside):.2f}",
            ),
            (f"messages/s, {streams} streams", "", f"{rate:,.0f}"),
            (f"tokens/s, {streams} streams", "", f"{token_rate:,.0f}"),
        ),
        {"bench": "gateway", "added_ms_p50": round(added, 3), "messages_per_s": round(rate, 1)},
    )


def in_process(model: str, requests: int) -> list[float]:
    """Seconds of each request on an engine in its thread."""
    engine, _, _ = build(ModelSpec(path=model))
    done = threading.Event()

    def deliver(news: News) -> None:
        if any(getattr(item, "usage", None) is not None for item in news):
            done.set()

    loop = EngineLoop(engine, deliver)
    loop.start()
    times = []
    for i in range(requests):
        done.clear()
        start = time.perf_counter()
        loop.submit(Request(str(i), PROMPT, SamplingParams(temperature=0, max_tokens=1)))
        done.wait()
        times.append(time.perf_counter() - start)
    loop.stop()
    return times


async def through_grpc(target: str, model: str, requests: int) -> list[float]:
    """Seconds of each request from a client's call to the end of its stream."""
    times = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(
            model=model,
            tokens=pb.TokenIds(ids=PROMPT),
            sampling=pb.SamplingParams(temperature=0, max_tokens=1),
        )
        for _ in range(requests):
            start = time.perf_counter()
            async for _ in stub.Generate(request):
                pass
            times.append(time.perf_counter() - start)
    return times


async def flood(target: str, model: str, streams: int, tokens: int) -> tuple[float, float]:
    """Messages and tokens a second that a client receives on many streams at once."""
    request = pb.GenerateRequest(
        model=model,
        tokens=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
    )

    async def one(stub: inference_pb2_grpc.InferenceStub) -> int:
        return sum([1 async for _ in stub.Generate(request)])

    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        start = time.perf_counter()
        messages = sum(await asyncio.gather(*(one(stub) for _ in range(streams))))
        taken = time.perf_counter() - start
    return messages / taken, streams * tokens / taken


def tiny(folder: Path) -> Path:
    """A checkpoint that costs next to nothing to run."""
    import torch

    from models.checkpoint import save
    from models.registry import family, names

    config = {
        "model_type": "gla", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1,
        "intermediate_size": 16, "eos_token_id": 0,
    }  # fmt: skip
    host = family(config, "tiny")
    _, model = host.build(config, "tiny")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save(folder / "tiny", model, names(config, "tiny"), config, torch.float32)
    return folder / "tiny"
