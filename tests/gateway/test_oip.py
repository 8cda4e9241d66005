"""The Open Inference Protocol against a real engine: tensors and parameters in, streams of responses out."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.inference import grpc_service_pb2 as wire
from protos.inference import grpc_service_pb2_grpc
from serving import LLM, SamplingParams
from serving.config import GatewaySpec
from serving.errors import InvalidArgumentError
from serving.gateway.tensors import CONTENTS, NUMBERS, add_output, read_inputs
from tests import tiny
from tests.gateway.harness import Context, House, house
from tests.gateway.ingress import grpc_port, patient  # noqa: F401  (used by being here)

SERVICE = "inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
async def shared(folder: Path) -> AsyncIterator[House]:
    async with house(folder, max_tokens=4096) as h:
        yield h
        await h.idle()


def tensor(
    request: wire.ModelInferRequest, name: str, datatype: str, values: list[Any], raw: bool = True
) -> None:
    given = request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
    if not raw:
        getattr(given.contents, CONTENTS[datatype]).extend(values)
    elif datatype == "BYTES":
        request.raw_input_contents.append(b"".join(struct.pack("<I", len(v)) + v for v in values))
    else:
        request.raw_input_contents.append(np.array(values, NUMBERS[datatype]).tobytes())


def ask(
    text: str | None = "def f", raw: bool = True, outputs: tuple[str, ...] = (), **settings: Any
) -> wire.ModelInferRequest:
    request = wire.ModelInferRequest(model_name="tiny", id="7")
    if text is not None:
        tensor(request, "text_input", "BYTES", [text.encode()], raw)
    for name, value in {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **settings}.items():
        if name == "stream":
            tensor(request, name, "BOOL", [value], raw)
        elif value is not None:
            kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
            setattr(request.parameters[name], kinds[type(value)], value)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def read(response: wire.ModelInferResponse) -> dict[str, list[Any]]:
    """Outputs by name."""
    found = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            values, at = [], 0
            while at < len(raw):
                (length,) = struct.unpack_from("<I", raw, at)
                values.append(raw[at + 4 : at + 4 + length].decode())
                at += 4 + length
        else:
            values = np.frombuffer(raw, NUMBERS[output.datatype]).tolist()
        assert list(output.shape) == [len(values)]
        found[output.name] = values
    return found


async def exchange(
    h: House, *requests: wire.ModelInferRequest | bytes, metadata: tuple[tuple[str, str], ...] = ()
) -> tuple[list[wire.ModelStreamInferResponse], grpc.aio.AioRpcError | None]:
    """All responses of one stream, over a socket; and the status that it ended with, unless that is OK."""
    async with grpc_port(h.rpc) as address, grpc.aio.insecure_channel(address) as channel:
        bodies = iter([r if isinstance(r, bytes) else r.SerializeToString() for r in requests])
        call = channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer", response_deserializer=wire.ModelStreamInferResponse.FromString
        )(bodies, metadata=metadata)
        messages = []
        try:
            async for message in call:  # those before an error are wanted, too
                messages.append(message)  # noqa: PERF401
        except grpc.aio.AioRpcError as error:
            return messages, error
        return messages, None


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
async def test_infer_is_what_the_engine_alone_gives(folder: Path, shared: House, raw: bool) -> None:
    expected = (
        LLM(folder, dtype="float32", slots=4)
        .generate(
            "def f", SamplingParams(temperature=0.9, seed=5, n=2, max_tokens=12, ignore_eos=True, logprobs=0)
        )[0]
        .outputs
    )
    request = ask(raw=raw, temperature=0.9, seed=5, n=2, stream=False, logprobs=0)
    response, context = await shared.unary(INFER, request)
    assert context.code is grpc.StatusCode.OK, context.details
    assert (response.id, response.model_name, response.model_version) == ("7", "tiny", "1")
    found = read(response)
    assert found["text_output"] == [one.text for one in expected]
    assert found["token_ids"] == [token for one in expected for token in one.token_ids]
    assert found["depths"] == [depth for one in expected for depth in one.depths]
    assert found["logprobs"] == pytest.approx([p for one in expected for p in one.logprobs or ()], abs=1e-5)
    assert (found["index"], found["length"], found["finish_reason"]) == (
        [0, 1],
        [12, 12],
        ["length", "length"],
    )
    assert response.parameters["triton_final_response"].bool_param
    assert response.parameters["completion_tokens"].int64_param == 24
    assert response.parameters["mean_depth"].double_param == 1.0


async def test_ids_in_and_only_the_outputs_that_were_asked_for(folder: Path, shared: House) -> None:
    llm = LLM(folder, dtype="float32")
    expected = llm.generate("def f", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0]
    for datatype in ("INT32", "INT64", "UINT32"):
        request = ask(None, outputs=("token_ids", "logprobs"))
        tensor(request, "input_ids", datatype, llm.encode("def f"))
        request.inputs[0].shape[:] = [1, len(llm.encode("def f"))]
        response, _ = await shared.unary(INFER, request)
        found = read(response)
        assert list(found) == ["token_ids", "logprobs"]
        assert found["token_ids"] == expected.token_ids and len(found["logprobs"]) == 12


async def test_settings_as_json_as_tensors_and_as_parameters_mean_the_same(shared: House) -> None:
    plain, _ = await shared.unary(INFER, ask(temperature=0.8, seed=3, top_k=5, stop="x"))
    as_json = ask(temperature=None, max_tokens=None, ignore_eos=None)
    text = b'{"temperature": "0.8", "seed": 3, "top_k": "5", "stop": ["x"], "max_tokens": 12, "ignore_eos": true}'
    tensor(as_json, "sampling_parameters", "BYTES", [text])
    as_tensors = ask(temperature=None, max_tokens=None)
    for name, kind, value in (("temperature", "FP64", 0.8), ("seed", "UINT64", 3), ("top_k", "INT32", 5)):
        tensor(as_tensors, name, kind, [value])
    tensor(as_tensors, "max_tokens", "INT32", [12])
    tensor(as_tensors, "stop", "BYTES", [b"x"])
    for other in (as_json, as_tensors):
        response, context = await shared.unary(INFER, other)
        assert context.code is grpc.StatusCode.OK, context.details
        assert read(response)["token_ids"] == read(plain)["token_ids"]


async def test_the_prompt_comes_back_where_it_is_not_excluded(shared: House) -> None:
    plain, _ = await shared.unary(INFER, ask(n=2))
    echoed, _ = await shared.unary(INFER, ask(n=2, exclude_input_in_output=False))
    assert read(echoed)["text_output"] == ["def f" + text for text in read(plain)["text_output"]]


async def test_a_grammar_and_a_depth(shared: House) -> None:
    response, context = await shared.unary(
        INFER, ask(regex="(yes|no)", ignore_eos=None, temperature=1.0, depth="full")
    )
    assert context.code is grpc.StatusCode.OK, context.details
    assert read(response)["text_output"][0] in ("yes", "no")


async def test_many_requests_share_a_stream_and_one_that_fails_fails_alone(shared: House) -> None:
    wanted = {}
    requests: list[wire.ModelInferRequest] = []
    for number in range(6):
        request = ask(f"def f{number}", stream=number % 2 == 0, max_tokens=20)
        request.id = str(number)
        requests.append(request)
        whole, _ = await shared.unary(INFER, ask(f"def f{number}", max_tokens=20))
        wanted[str(number)] = read(whole)["text_output"][0]
    bad = ask(max_tokens=-1)
    bad.id = "bad"
    messages, error = await exchange(shared, *requests, bad, b"\xff\xff")
    assert error is None
    failed = [m for m in messages if m.error_message]
    assert {m.infer_response.id for m in failed} == {"bad", ""}
    assert any("max_tokens = -1" in m.error_message for m in failed)
    for number in range(6):
        mine = [m.infer_response for m in messages if m.infer_response.id == str(number)]
        assert "".join(read(m)["text_output"][0] for m in mine) == wanted[str(number)]
        assert [m.parameters["triton_final_response"].bool_param for m in mine] == [False] * (
            len(mine) - 1
        ) + [True]
        assert len(mine) == 1 or number % 2 == 0
        assert mine[-1].parameters["completion_tokens"].int64_param == 20
    assert sum(m.infer_response.id == "0" for m in messages) > 1, "nothing was streamed"


async def test_a_client_that_asks_for_statuses_gets_one(shared: House) -> None:
    messages, error = await exchange(
        shared, ask(top_p=7.0, stream=True), metadata=(("triton_grpc_error", "true"),)
    )
    assert not messages and error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "top_p = 7" in str(error.details())
    assert len((await exchange(shared, ask()))[0]) == 1, "the server does not go on"


async def test_a_client_that_goes_frees_its_slots(folder: Path) -> None:
    async with house(folder, slots=4) as h:
        async with grpc_port(h.rpc) as address, grpc.aio.insecure_channel(address) as channel:
            call = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
            for _ in range(3):
                await call.write(ask(max_tokens=100_000, stream=True))
            assert not (await call.read()).error_message
            call.cancel()
            await h.idle()
            text = (await h.metrics.scrape(h.fleet)).decode()
        assert 'outcome="CANCELLED"} 3' in text


async def test_a_sequence_goes_on_from_what_came_before(folder: Path, tmp_path: Path) -> None:
    """Its requests may be sent without waiting: they go in their order."""
    llm = LLM(folder, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected, tokens = [], []
    for text in ("def f", "(x)", ":"):
        tokens += llm.encode(text)
        expected.append(llm.generate([tokens], params)[0].token_ids)
        tokens = tokens + expected[-1]
    async with house(folder, gateway=GatewaySpec(state_store=str(tmp_path))) as h:
        requests = [
            ask("def f", sequence_id=7, sequence_start=True),
            ask("(x)", sequence_id=7),
            ask(":", sequence_id=7, sequence_end=True),
            ask("def f", sequence_id="other", sequence_start=True),
            ask("def f", sequence_id=7),
        ]
        messages, error = await exchange(h, *requests)
        assert error is None
        failed = [m.error_message for m in messages if m.error_message]
        assert len(failed) == 1 and "sequence_id = '7': there is no such sequence" in failed[0]
        found = [read(m.infer_response)["token_ids"] for m in messages if not m.error_message]
        for wanted in (*expected, expected[0]):
            found.remove(wanted)
        assert not found
        assert [r.id[:9] for r in await h.requests.sessions.all("")] == ["sequence-"], "the one not ended"


async def test_deadlines_in_microseconds_and_in_seconds(shared: House) -> None:
    for timeout in ({"timeout": 300_000}, {"timeout_s": 0.3}):
        messages, error = await exchange(shared, ask(max_tokens=4000, stream=True, **timeout))
        assert error is None
        assert "DEADLINE_EXCEEDED" in messages[-1].error_message and "0.3" in messages[-1].error_message
        assert read(messages[0].infer_response)["token_ids"]
        _, context = await shared.unary(INFER, ask(max_tokens=4000, **timeout))
        assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED


def changed(**fields: Any) -> wire.ModelInferRequest:
    request = ask()
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def misshapen(**fields: Any) -> wire.ModelInferRequest:
    request = ask()
    for name, value in fields.items():
        if name == "shape":
            request.inputs[0].shape[:] = value
        else:
            setattr(request.inputs[0], name, value)
    return request


def with_input(name: str, datatype: str, values: list[Any]) -> wire.ModelInferRequest:
    request = ask()
    tensor(request, name, datatype, values)
    return request


def with_raw(*raw: bytes) -> wire.ModelInferRequest:
    request = ask()
    request.raw_input_contents[:] = raw
    return request


def with_region() -> wire.ModelInferRequest:
    request = ask()
    request.inputs[0].parameters["shared_memory_region"].string_param = "x"
    return request


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (ask(frequency=1), "INVALID_ARGUMENT", "parameters.frequency: is unknown; known are"),
        (ask(max_tokens="many"), "INVALID_ARGUMENT", "max_tokens = 'many'"),
        (ask(max_tokens=True), "INVALID_ARGUMENT", "max_tokens = True"),
        (ask(temperature=float("nan")), "INVALID_ARGUMENT", "temperature = nan"),
        (ask(depth="fixed(9)"), "INVALID_ARGUMENT", "depth"),
        (ask(depth="sideways"), "INVALID_ARGUMENT", "depth = 'sideways'"),
        (ask(regex="("), "INVALID_ARGUMENT", "ignore_eos"),
        (ask(regex="(", ignore_eos=None), "INVALID_ARGUMENT", "grammar = '\\('"),
        (ask(regex="a", lark="b"), "INVALID_ARGUMENT", "regex and lark"),
        (ask(priority=-1), "INVALID_ARGUMENT", "priority = -1"),
        (ask(timeout=1, timeout_s=1.0), "INVALID_ARGUMENT", "timeout"),
        (ask(timeout=-5), "INVALID_ARGUMENT", "timeout_s = -5e-06"),
        (ask(stream=True), "INVALID_ARGUMENT", "ModelStreamInfer"),
        (ask(sequence_id=7), "NOT_FOUND", "sequence_id = '7': there is no such sequence"),
        (ask(sequence_end=True), "INVALID_ARGUMENT", "sequence_id"),
        (ask(outputs=("text_output", "embedding")), "INVALID_ARGUMENT", "outputs = 'embedding'"),
        (ask(None), "INVALID_ARGUMENT", "text_input and input_ids"),
        (ask(""), "INVALID_ARGUMENT", "prompt"),
        (changed(model_name="nope"), "NOT_FOUND", "model = 'nope'"),
        (changed(model_version="2"), "NOT_FOUND", "model_version = '2'"),
        (misshapen(shape=[2]), "INVALID_ARGUMENT", r"inputs\[text_input\].shape = \[2\]: has 2 elements"),
        (misshapen(shape=[-1]), "INVALID_ARGUMENT", r"shape = \[-1\]"),
        (misshapen(datatype="FP8"), "INVALID_ARGUMENT", "datatype = 'FP8'"),
        (misshapen(datatype="INT64"), "INVALID_ARGUMENT", "9 bytes.*multiple of 8"),
        (with_raw(b"\x05\x00\x00\x00abc"), "INVALID_ARGUMENT", "end within an element"),
        (with_raw(b"\x01"), "INVALID_ARGUMENT", "end within an element"),
        (with_raw(b"\x02\x00\x00\x00\xff\xfe"), "INVALID_ARGUMENT", "not UTF-8"),
        (with_raw(b"", b""), "INVALID_ARGUMENT", "raw_input_contents = '2 entries'"),
        (with_input("text_input", "BYTES", [b"x"]), "INVALID_ARGUMENT", "inputs = 'text_input': is there twice"),
        (with_input("prompt", "BYTES", [b"x"]), "INVALID_ARGUMENT", "inputs.prompt: is unknown"),
        (with_input("input_ids", "INT32", [1]), "INVALID_ARGUMENT", "one of text_input and input_ids"),
        (with_input("top_k", "INT32", [1, 2]), "INVALID_ARGUMENT", "must have one element"),
        (with_input("max_tokens", "INT32", [3]), "INVALID_ARGUMENT", "max_tokens: is given twice"),
        (with_input("sampling_parameters", "BYTES", [b"["]), "INVALID_ARGUMENT", "not valid JSON"),
        (with_input("sampling_parameters", "BYTES", [b"[]"]), "INVALID_ARGUMENT", "must be a JSON object"),
        (
            with_input("sampling_parameters", "BYTES", [b'{"stream": true}']),
            "INVALID_ARGUMENT",
            "sampling_parameters.stream",
        ),
        (
            with_input("sampling_parameters", "BYTES", [b'{"logit_bias": {"a": 1}}']),
            "INVALID_ARGUMENT",
            "logit_bias = 'a'",
        ),
        (with_region(), "INVALID_ARGUMENT", "shared_memory_region"),
        (b"\xff\xff\xff", "INVALID_ARGUMENT", "not a valid inference.ModelInferRequest"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)  # fmt: skip
async def test_bad_input_gets_the_right_code_and_names_the_field(
    shared: House, request_, code, words
) -> None:  # type: ignore[no-untyped-def]
    import re

    _, context = await shared.unary(INFER, request_)
    assert context.code.name == code, context.details
    assert re.search(words, context.details), context.details


async def test_negative_ids_are_refused(shared: House) -> None:
    request = ask(None)
    tensor(request, "input_ids", "INT32", [1, -3])
    _, context = await shared.unary(INFER, request)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT and "-3" in context.details


async def test_the_server_and_its_models_describe_themselves(folder: Path) -> None:
    async with house(folder) as h:
        live, _ = await h.unary(f"{SERVICE}/ServerLive", wire.ServerLiveRequest())
        ready, _ = await h.unary(f"{SERVICE}/ServerReady", wire.ServerReadyRequest())
        assert live.live and ready.ready
        for name, version, expected in (
            ("tiny", "", True),
            ("tiny", "1", True),
            ("tiny", "2", False),
            ("nope", "", False),
        ):
            answer, _ = await h.unary(
                f"{SERVICE}/ModelReady", wire.ModelReadyRequest(name=name, version=version)
            )
            assert answer.ready is expected
        server, _ = await h.unary(f"{SERVICE}/ServerMetadata", wire.ServerMetadataRequest())
        assert server.name == "fathom"
        model, _ = await h.unary(f"{SERVICE}/ModelMetadata", wire.ModelMetadataRequest(name="tiny"))
        assert [t.name for t in model.inputs][:3] == ["text_input", "input_ids", "stream"]
        assert "text_output" in [t.name for t in model.outputs]
        _, context = await h.unary(f"{SERVICE}/ModelMetadata", wire.ModelMetadataRequest(name="nope"))
        assert context.code is grpc.StatusCode.NOT_FOUND
        index, _ = await h.unary(f"{SERVICE}/RepositoryIndex", wire.RepositoryIndexRequest(ready=True))
        assert [(m.name, m.state) for m in index.models] == [("tiny", "READY")]
        await h.replicas[0].stop()
        async with asyncio.timeout(5):
            while h.fleet.replicas():
                await asyncio.sleep(0.01)
        ready, _ = await h.unary(f"{SERVICE}/ServerReady", wire.ServerReadyRequest())
        assert not ready.ready
        index, _ = await h.unary(f"{SERVICE}/RepositoryIndex", wire.RepositoryIndexRequest())
        assert [(m.name, m.state) for m in index.models] == [("tiny", "UNAVAILABLE")]


async def test_random_bytes_never_break_anything(shared: House) -> None:
    rng = random.Random(0)
    whole = ask(stream=False, seed=3, top_k=4).SerializeToString()
    codes = set()
    for i in range(300):
        body = bytearray(whole if i % 2 else rng.randbytes(rng.randrange(60)))
        for _ in range(rng.randrange(1, 4)):
            if body:
                body[rng.randrange(len(body))] = rng.randrange(256)
        _, context = await shared.unary(INFER, bytes(body))
        codes.add(context.code.name)
    assert codes <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"}, codes


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(), "BYTES": st.binary(max_size=9),
    "FP32": st.floats(width=32, allow_nan=False), "FP64": st.floats(allow_nan=False),
    **{f"{sign}INT{bits}": st.integers(0 if sign else -(2 ** (bits - 1)), 2 ** (bits - (not sign)) - 1)
       for sign in ("", "U") for bits in (8, 16, 32, 64)},
}  # fmt: skip


@given(data=st.data(), raw=st.booleans(), datatype=st.sampled_from(sorted(VALUES)))
def test_tensors_come_in_as_they_were_put(data: st.DataObject, raw: bool, datatype: str) -> None:
    values = data.draw(st.lists(VALUES[datatype], max_size=6))
    request = wire.ModelInferRequest()
    tensor(request, "a", datatype, values, raw)
    assert read_inputs(wire.ModelInferRequest.FromString(request.SerializeToString()))["a"].values == values


@given(raw=st.binary(max_size=24), datatype=st.sampled_from(sorted(VALUES)), size=st.integers(-1, 4))
def test_any_bytes_are_a_tensor_or_refused(raw: bytes, datatype: str, size: int) -> None:
    request = wire.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="a", datatype=datatype, shape=[size])
    with suppress(InvalidArgumentError):
        assert len(read_inputs(request)["a"].values) == size


@given(
    texts=st.lists(st.text(max_size=5), max_size=4),
    numbers=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
)
def test_tensors_go_out_as_they_are_read(texts: list[str], numbers: list[int]) -> None:
    response = wire.ModelInferResponse()
    add_output(response, "texts", "BYTES", texts)
    add_output(response, "numbers", "INT32", numbers)
    assert read(response) == {"texts": texts, "numbers": numbers}


def test_context_is_the_part_of_grpc_that_is_used() -> None:
    """So that the fake cannot drift: grpc.aio's own context has all of it."""
    used = {name for name in dir(Context) if not name.startswith("_")} - {"code", "details", "metadata"}
    assert used <= set(dir(grpc.aio.ServicerContext))
