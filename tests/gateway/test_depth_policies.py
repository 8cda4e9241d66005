"""Policies of depth at every door: what a model cannot do is refused by its name, everywhere in the same words."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from typer.testing import CliRunner

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc
from protos.inference import grpc_service_pb2 as wire
from protos.inference import grpc_service_pb2_grpc
from serving.cli import app
from serving.config import GatewaySpec
from serving.errors import InvalidArgumentError
from serving.gateway.http import make_app
from tests import tiny
from tests.gateway.harness import house
from tests.gateway.ingress import grpc_port, http_port, patient  # noqa: F401  (used by being here)
from tests.gateway.test_oip import SERVICE, tensor

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


@pytest.fixture(scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    folder = tmp_path_factory.mktemp("models")
    folders = [tiny.checkpoint(folder / name, config) for name, config in MODELS.items()]
    for made in folders:
        (made / "chat_template.jinja").write_text("{{ messages[0].content }}")
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


Refusal = tuple[str, str] | None
"""The status and the text, or None where the request was served."""


async def fathom(doors: Doors, model: str, text: str, policy: pb.DepthPolicy) -> Refusal:
    async with grpc.aio.insecure_channel(doors.target) as channel:
        sampling = pb.SamplingParams(max_tokens=2)
        request = pb.GenerateRequest(model=model, text="def f", sampling=sampling, depth=policy)
        try:
            [_ async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request)]
        except grpc.aio.AioRpcError as error:
            return error.code().name, str(error.details())
    return None


async def score(doors: Doors, model: str, text: str, policy: pb.DepthPolicy) -> Refusal:
    async with grpc.aio.insecure_channel(doors.target) as channel:
        try:
            request = pb.ScoreRequest(model=model, text="def f", depth=policy)
            await inference_pb2_grpc.InferenceStub(channel).Score(request)
        except grpc.aio.AioRpcError as error:
            return error.code().name, str(error.details())
    return None


def infer(model: str, text: str, *, as_json: bool, stream: bool) -> wire.ModelInferRequest:
    request = wire.ModelInferRequest(model_name=model, id="7")
    tensor(request, "text_input", "BYTES", [b"def f"])
    tensor(request, "stream", "BOOL", [stream])
    if as_json:
        given = json.dumps({"depth": text, "max_tokens": 2})
        tensor(request, "sampling_parameters", "BYTES", [given.encode()])
    else:
        request.parameters["depth"].string_param = text
        request.parameters["max_tokens"].int64_param = 2
    return request


def oip(as_json: bool) -> "Door":
    async def ask(doors: Doors, model: str, text: str, policy: pb.DepthPolicy) -> Refusal:
        async with grpc.aio.insecure_channel(doors.target) as channel:
            stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                await stub.ModelInfer(infer(model, text, as_json=as_json, stream=False))
            except grpc.aio.AioRpcError as error:
                return error.code().name, str(error.details())
        return None

    return ask


def oip_stream(with_status: bool) -> "Door":
    async def ask(doors: Doors, model: str, text: str, policy: pb.DepthPolicy) -> Refusal:
        async with grpc.aio.insecure_channel(doors.target) as channel:
            call = channel.stream_stream(
                f"/{SERVICE}/ModelStreamInfer",
                request_serializer=wire.ModelInferRequest.SerializeToString,
                response_deserializer=wire.ModelStreamInferResponse.FromString,
            )
            metadata = (("triton_grpc_error", "true"),) if with_status else ()
            request = infer(model, text, as_json=False, stream=True)
            try:
                async for message in call(iter([request]), metadata=metadata):
                    if message.error_message:
                        code, _, words = message.error_message.partition(": ")
                        return code, words
            except grpc.aio.AioRpcError as error:
                return error.code().name, str(error.details())
        return None

    return ask


def openai(path: str, stream: bool) -> "Door":
    async def ask(doors: Doors, model: str, text: str, policy: pb.DepthPolicy) -> Refusal:
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "def f"}]}
        asked = {"model": model, "max_tokens": 2, "depth": text, "stream": stream}
        asked |= chat if "chat" in path else {"prompt": "def f"}
        async with httpx.AsyncClient(base_url=doors.url, timeout=30) as client:
            answer = await client.post(path, json=asked)
        if answer.status_code == 200:
            return None
        return {400: "INVALID_ARGUMENT"}[answer.status_code], answer.json()["error"]["message"]

    return ask


Door = Callable[[Doors, str, str, pb.DepthPolicy], Awaitable[Refusal]]
DOORS: dict[str, Door] = {
    "fathom.v1 Generate": fathom,
    "fathom.v1 Score": score,
    "OIP": oip(False),
    "OIP, as JSON": oip(True),
    "OIP, streaming": oip_stream(False),
    "OIP, streaming, with a status": oip_stream(True),
    "completions": openai("/v1/completions", False),
    "completions, streaming": openai("/v1/completions", True),
    "chat": openai("/v1/chat/completions", False),
    "chat, streaming": openai("/v1/chat/completions", True),
}
IMPOSSIBLE = [
    ("looped", "fixed(9)", Policy(fixed=9), "depth.fixed = 9: "),
    ("looped", "full(min=4)", Policy(full=Unit(), min_depth=4), "depth.min_depth = 4: "),
    ("looped", "router", Policy(router=Unit()), "depth = 'router': "),
    ("looped", "gate(nan)", Policy(gate=Criterion(threshold=math.nan)), "depth.gate.threshold = nan: "),
    (
        "looped",
        "converged(kl, inf)",
        Policy(converged=Criterion(measure=Policy.KL, threshold=math.inf)),
        "depth.converged.threshold = inf: ",
    ),
    ("looped", "full(width=0.5)", Policy(full=Unit(), width=0.5), "depth.width = 0.5: "),
    ("nested", "gate(0.5)", Policy(gate=Criterion(threshold=0.5)), "depth = 'gate': "),
    ("nested", "fixed(2)", Policy(fixed=2), "depth.fixed = 2: "),
    ("plain", "chain(0, 7)", Policy(chain=pb.Chain(layers=[0, 7])), "depth.chain = 7: "),
    ("plain", "gate(0.5)", Policy(gate=Criterion(threshold=0.5)), "depth = 'gate': "),
]


@pytest.mark.parametrize("door", DOORS)
async def test_what_is_impossible_is_refused_at_every_door(doors: Doors, door: str) -> None:
    for model, text, policy, words in IMPOSSIBLE:
        refusal = await DOORS[door](doors, model, text, policy)
        assert refusal is not None and refusal[0] == "INVALID_ARGUMENT" and words in refusal[1], (
            text,
            refusal,
        )
    assert await DOORS[door](doors, "looped", "fixed(2)", Policy(fixed=2)) is None
