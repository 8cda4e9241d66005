"""Policies of depth at every door: what a model cannot do is refused by its name, everywhere in the same words."""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from typer.testing import CliRunner

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc
from serving.cli import app
from serving.config import GatewaySpec
from serving.errors import InvalidArgumentError
from serving.gateway.http import make_app
from tests import tiny
from tests.gateway.harness import house
from tests.gateway.ingress import grpc_port, http_port, patient  # noqa: F401  (used by being here)

Policy, Criterion, Unit = pb.DepthPolicy, pb.DepthPolicy.Criterion, pb.DepthPolicy.Unit
NESTED = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "exits": [1, 3],
    "widths": [0.5],
}  # fmt: skip
MODELS = {"plain": tiny.GLA, "looped": tiny.LOOPED, "nested": NESTED}


@dataclass
class Doors:
    target: str
    url: str


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    folders = [tiny.checkpoint(tmp_path / name, config) for name, config in MODELS.items()]
    spec = GatewaySpec()
    async with (
        house(*folders) as h,
        grpc_port(h.rpc) as target,
        http_port(make_app(h.requests, h.fleet, spec, h.metrics)) as url,
    ):
        yield Doors(target, url)
        await h.idle()


REFUSED = [
    ("looped", Policy(fixed=9), "depth.fixed = 9: the full depth of this model is 3"),
    ("looped", Policy(fixed=2**32 - 1), "depth.fixed = 4294967295: "),
    ("looped", Policy(max_depth=0), "depth.max_depth = 0: "),
    ("looped", Policy(router=Unit()), "depth = 'router': this model has no router"),
    ("looped", Policy(gate=Criterion(threshold=math.nan)), "depth.gate.threshold = nan: "),
    ("looped", Policy(gate=Criterion(threshold=math.inf)), "depth.gate.threshold = inf: "),
    ("looped", Policy(gate=Criterion(measure=Policy.KL)), "depth.gate.measure = 6: a gate"),
    ("looped", Policy(confidence=Criterion(measure=77)), "depth.confidence.measure = 77: "),  # type: ignore[arg-type]
    ("looped", Policy(converged=Criterion(measure=Policy.MARGIN)), "depth.converged.measure = 'margin': "),
    ("looped", Policy(chain=pb.Chain(layers=[0])), "depth.chain = (0,): the layers of this model stay"),
    ("looped", Policy(width=0.5), "depth.width = 0.5: this model is not nested by width"),
    ("plain", Policy(gate=Criterion()), "depth = 'gate': every token of this model takes all"),
    ("plain", Policy(chain=pb.Chain(layers=[0, 2])), "depth.chain = 2: the layers of this model are 0 to 1"),
    ("plain", Policy(chain=pb.Chain(layers=[2**32 - 1])), "depth.chain = 4294967295: "),
    (
        "plain",
        Policy(chain=pb.Chain(layers=[0] * 9)),
        "depth.chain = (0, 0, 0, 0, 0, 0, 0, 0, 0): a layer that",
    ),
    ("nested", Policy(fixed=2), "depth.fixed = 2: must be one of 1, 3, 4"),
    ("nested", Policy(full=Unit(), min_depth=2, max_depth=2), "depth.max_depth = 2: no token can leave"),
    ("nested", Policy(width=0.3), "depth.width = 0.3: must be one of 0.5, 1"),
    ("nested", Policy(width=math.nan), "depth.width = nan: "),
]


async def test_what_is_impossible_is_refused_by_name_and_the_server_goes_on(doors: Doors) -> None:
    async with grpc.aio.insecure_channel(doors.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = pb.SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)

        async def depths(model: str, policy: pb.DepthPolicy) -> list[int]:
            request = pb.GenerateRequest(model=model, text="def f", sampling=sampling, depth=policy)
            return [depth async for message in stub.Generate(request) for depth in message.depths]

        for model, policy, words in REFUSED:
            for door in (
                depths(model, policy),
                stub.Score(pb.ScoreRequest(model=model, text="def", depth=policy)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await door
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert str(refused.value.details()).startswith(words)
        assert await depths("looped", Policy(fixed=2)) == [2, 2]
        assert await depths("nested", Policy(fixed=3, width=0.5)) == [3, 3]
        assert await depths("plain", Policy(chain=pb.Chain(layers=[0, 0, 1]))) == [3, 3]


TEXTS = {
    "fixed(9)": "depth.fixed = 9: the full depth of this model is 3",
    "fixed(0)": "depth.fixed = 0: must be a whole number from 1",
    "fixed(two)": "depth = 'fixed(two)': 'two' is not a number",
    "gate(nan)": "depth.gate.threshold = nan: must be a number from 0 to 1",
    "gate(0.5, min=1, min=2)": "depth = 'gate(0.5, min=1, min=2)': min is there twice",
    "confidence(kl)": "depth.confidence.measure = 'kl': must be one of probability, margin, entropy",
    "chain(0, -1)": "depth.chain = -1: must name layers by whole numbers from 0 to 65536",
    "chain(99999999999)": "depth.chain = 99999999999: must name layers",
    "chain(0, 1)": "depth.chain = (0, 1): the layers of this model stay in their order",
    "": "depth = '': must look like full",
}


async def test_text_is_refused_in_the_same_words_by_http_and_the_command_line(doors: Doors) -> None:
    command = ["generate", "--target", doors.target, "--model", "looped", "--max-tokens", "2", "--show-depth"]
    async with httpx.AsyncClient(base_url=doors.url, timeout=30) as client:

        async def post(depth: str) -> httpx.Response:
            asked = {"model": "looped", "prompt": "def", "max_tokens": 2, "depth": depth}
            return await client.post("/v1/completions", json=asked)

        for text, words in TEXTS.items():
            answer = await post(text)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith(words)
            told = await asyncio.to_thread(CliRunner().invoke, app, [*command, "--depth", text, "def"])
            assert told.exit_code != 0
            # What main() prints in one line.
            assert isinstance(told.exception, InvalidArgumentError) or "ClientError" in repr(told.exception)
            assert words in str(told.exception) and "\n" not in str(told.exception)
        assert (await post("fixed(2)")).json()["usage"]["mean_depth"] == 2
        told = await asyncio.to_thread(CliRunner().invoke, app, [*command, "--depth", "fixed(2)", "def"])
        assert told.exit_code == 0


async def test_usage_of_a_prompt_that_is_only_read_says_its_depth(doors: Doors) -> None:
    asked = {
        "model": "looped", "prompt": "def f", "max_tokens": 0, "echo": True, "logprobs": 1, "depth": "fixed(1)",
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=doors.url, timeout=30) as client:
        usage = (await client.post("/v1/completions", json=asked)).json()["usage"]
    assert usage["mean_depth"] == 1 and usage["flops_saved"] > 0
