"""The gRPC door against a real engine: streams, status codes, cancellation, bad input."""

import asyncio
import random
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import models_pb2
from serving import LLM, SamplingParams
from tests import tiny
from tests.gateway.harness import Context, call, house

GENERATE = "fathom.v1.Inference/Generate"
SCORE = "fathom.v1.Inference/Score"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def ask(text: str = "def f", **sampling: object) -> pb.GenerateRequest:
    options = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**options))  # type: ignore[arg-type]


async def test_a_stream_is_what_the_engine_alone_gives(folder: Path) -> None:
    params = SamplingParams(temperature=0.9, seed=5, n=3, max_tokens=20, ignore_eos=True, logprobs=2)
    expected = LLM(folder, dtype="float32", slots=4).generate("def f", params)[0].outputs
    async with house(folder) as h:
        request = ask(temperature=0.9, seed=5, n=3, max_tokens=20, logprobs=2)
        messages, context = await h.stream(GENERATE, request)
        assert context.code is grpc.StatusCode.OK
        for index in range(3):
            mine = [m for m in messages if m.index == index]
            assert "".join(m.text for m in mine) == expected[index].text
            assert [i for m in mine for i in m.token_ids] == expected[index].token_ids
            assert [p for m in mine for p in m.logprobs] == pytest.approx(expected[index].logprobs)
            assert [d for m in mine for d in m.depths] == expected[index].depths
            assert sum(len(m.top_logprobs) for m in mine) == 20
            assert [m.finish_reason for m in mine if m.finish_reason] == [pb.LENGTH]
        assert [m.usage.completion_tokens for m in messages if m.HasField("usage")] == [60]
        assert messages[-1].HasField("usage")
        await h.idle()


async def test_requests_of_one_id_do_not_meet(folder: Path) -> None:
    """Clients choose ids, and two may choose the same."""
    texts = ["def f", "class A", "import os", "x ="]
    expected = [LLM(folder, dtype="float32").generate(text, greedy(24))[0].token_ids for text in texts]
    async with house(folder) as h:
        requests = [ask(text, max_tokens=24) for text in texts]
        for request in requests:
            request.request_id = "mine"
        streams = asyncio.gather(*(h.stream(GENERATE, request) for request in requests))
        scores = asyncio.gather(
            *(h.unary(SCORE, pb.ScoreRequest(text=text, request_id="mine")) for text in texts)
        )
        for (messages, context), ids in zip(await streams, expected, strict=True):
            assert context.code is grpc.StatusCode.OK
            assert [i for m in messages for i in m.token_ids] == ids
            assert {m.request_id for m in messages} <= {"mine", ""}
        assert [context.code for _, context in await scores] == [grpc.StatusCode.OK] * 4
        await h.idle()


async def test_64_streams_some_cancelled_midway(folder: Path) -> None:
    expected = {
        i: LLM(folder, dtype="float32").generate(f"def f{i}", greedy(64))[0].token_ids
        for i in range(0, 64, 9)
    }
    async with house(folder, slots=24) as h:

        async def one(i: int) -> list[int] | None:
            ids: list[int] = []
            leaves = i % 4 == 3
            most = 1 << 16 if leaves else 64  # so many that it cannot be over before its client has left
            stream = h.rpc.stream(call(GENERATE, ask(f"def f{i}", max_tokens=most)), Context())
            async for message in stream:
                ids += message.token_ids
                if leaves and len(ids) > 10:
                    await stream.aclose()
                    return None
            return ids

        results = await asyncio.gather(*(one(i) for i in range(64)))
        for i, ids in enumerate(results):
            assert (ids is None) == (i % 4 == 3)
            assert ids is None or len(ids) == 64
            assert ids is None or i not in expected or ids == expected[i]
        await h.idle()
        text = (await h.metrics.scrape(h.fleet)).decode()
        counted = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line[0] != "#"
        }
        ended = {k: v for k, v in counted.items() if k.startswith("fathom:request_success_total")}
        assert sum(ended.values()) == 64
        assert next(v for k, v in ended.items() if '"length"' in k) == 48
        assert counted['fathom:requests_total{gateway="test",method="Generate",outcome="OK"}'] == 48
        assert counted['fathom:requests_total{gateway="test",method="Generate",outcome="CANCELLED"}'] == 16
        assert (
            next(v for k, v in counted.items() if k.startswith("fathom:generation_tokens_total")) >= 48 * 64
        )
        assert next(v for k, v in counted.items() if k.startswith("fathom:slots_used")) == 0


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


async def test_stop_strings_end_the_stream_and_the_sequence(folder: Path) -> None:
    whole = LLM(folder, dtype="float32").generate("def f", greedy(200))[0].text
    stop = whole[30:34]
    async with house(folder) as h:
        messages, _ = await h.stream(GENERATE, ask(max_tokens=200, stop=[stop]))
        assert "".join(m.text for m in messages) == whole[: whole.index(stop)]
        assert messages[-1].usage.completion_tokens == sum(len(m.token_ids) for m in messages)
        assert [m.finish_reason for m in messages if m.finish_reason] == [pb.STOP]
        await h.idle()


async def test_score_is_what_the_engine_alone_gives(folder: Path) -> None:
    llm = LLM(folder, dtype="float32")
    expected = llm.score("def f(x): return")[0]
    async with house(folder) as h:
        answer, context = await h.unary(SCORE, pb.ScoreRequest(text="def f(x): return"))
        assert context.code is grpc.StatusCode.OK
        assert list(answer.token_ids) == llm.encode("def f(x): return")
        assert list(answer.logprobs) == pytest.approx(expected, abs=1e-5)
        assert list(answer.depths) == [1] * len(expected)


async def test_a_deadline_ends_with_the_tokens_that_were_ready(folder: Path) -> None:
    async with house(folder) as h:
        request = ask(max_tokens=1_000_000)
        request.timeout_s = 0.5
        messages, context = await h.stream(GENERATE, request)
        assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED and "0.5" in context.details
        assert messages and messages[-1].finish_reason == pb.DEADLINE
        assert sum(len(m.token_ids) for m in messages) == messages[-1].usage.completion_tokens > 0
        await h.idle()


async def test_a_full_queue_answers_at_once(folder: Path) -> None:
    async with house(folder, slots=1, max_waiting=1) as h:
        running = []
        for number in (1, 2):  # one runs, then another waits
            running.append(asyncio.create_task(h.stream(GENERATE, ask(max_tokens=100_000))))
            while (load := h.replicas[0]._engine.load()).running + load.waiting < number or not load.running:
                await asyncio.sleep(0.01)
        _, context = await h.stream(GENERATE, ask())
        assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(context.trailing_metadata()) == {"grpc-retry-pushback-ms": "1000"}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await h.idle()


async def test_what_would_find_a_full_queue_is_not_sent_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(folder, slots=1, max_waiting=2) as h:
        replica, sent, told = h.replicas[0], [], []
        submit = replica._loop.submit
        monkeypatch.setattr(
            replica._loop, "submit", lambda request: (sent.append(request.id), submit(request))
        )
        monkeypatch.setattr(replica._loop, "refused", lambda: told.append(True))
        running = []
        for number in (1, 2, 3):  # one runs, then others wait
            running.append(asyncio.create_task(h.stream(GENERATE, ask(max_tokens=1_000_000))))
            while (load := h.fleet.replicas()[0].load).running + load.waiting < number:
                await asyncio.sleep(0.01)
        answers = await asyncio.gather(*(h.stream(GENERATE, ask()) for _ in range(20)))
        assert {context.code for _, context in answers} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert "2 requests are waiting" in answers[0][1].details
        assert len(sent) == 3
        while not told:  # so that it serves the newest first
            await asyncio.sleep(0.01)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await h.idle()


NAN = float("nan")


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(tokens=pb.TokenIds()), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[1, 300])), "INVALID_ARGUMENT", "300"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * 5000)), "INVALID_ARGUMENT", "4095"),
        (pb.GenerateRequest(text="x", model="nope"), "NOT_FOUND", "model = 'nope'.*tiny"),
        (ask(temperature=-1.0), "INVALID_ARGUMENT", "temperature = -1"),
        (ask(temperature=NAN), "INVALID_ARGUMENT", "temperature = nan"),
        (ask(max_tokens=0), "INVALID_ARGUMENT", "max_tokens = 0"),
        (ask(n=200), "INVALID_ARGUMENT", "n = 200.*128"),
        (ask(n=9), "INVALID_ARGUMENT", "n = 9.*8"),
        (ask(stop=[""]), "INVALID_ARGUMENT", "stop"),
        (ask(stop_token_ids=[999]), "INVALID_ARGUMENT", "stop_token_ids = 999"),
        (ask(logit_bias={7: NAN}), "INVALID_ARGUMENT", "logit_bias"),
        (ask(logprobs=65), "INVALID_ARGUMENT", "logprobs = 65"),
        (pb.GenerateRequest(text="x", timeout_s=-1), "INVALID_ARGUMENT", "timeout_s = -1"),
        (pb.GenerateRequest(text="x", timeout_s=NAN), "INVALID_ARGUMENT", "timeout_s = nan"),
        (pb.GenerateRequest(text="x", timeout_s=1e9), "INVALID_ARGUMENT", "timeout_s.*3600"),
        (pb.GenerateRequest(text="x", request_id="r" * 200), "INVALID_ARGUMENT", "request_id"),
        (pb.GenerateRequest(text="x", priority=1000), "INVALID_ARGUMENT", "priority = 1000"),
        (b"\x12\x05\xff\xfe\xfd\xfc\xfb", "INVALID_ARGUMENT", "not a valid"),  # text that is not UTF-8
        (b"\xff\xff\xff\xff", "INVALID_ARGUMENT", "not a valid"),
        (ask().SerializeToString() + b"\xf8\x07\x01", "INVALID_ARGUMENT", "field number 127"),
        (b"\x12" + b"\x80\x80\x80\x04" + b"a" * (8 << 20), "RESOURCE_EXHAUSTED", "at most 4194304"),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, str) else "",
)  # fmt: skip
async def test_bad_input_gets_the_right_code_and_names_the_field(shared, request_, code, words) -> None:  # type: ignore[no-untyped-def]
    import re

    _, context = await shared.stream(GENERATE, request_)
    assert context.code.name == code, context.details
    assert re.search(words, context.details), context.details
    good, context = await shared.stream(GENERATE, ask())
    assert context.code is grpc.StatusCode.OK and good, "the server does not go on"


@pytest.fixture(scope="module")
async def shared(folder: Path):  # type: ignore[no-untyped-def]
    async with house(folder, max_tokens=4096) as h:
        yield h
        await h.idle()


async def test_random_bytes_never_break_anything(shared) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(0)
    whole = ask(logprobs=1, stop=["x"], seed=3).SerializeToString()
    codes = set()
    for i in range(400):
        body = bytearray(whole if i % 2 else rng.randbytes(rng.randrange(40)))
        for _ in range(rng.randrange(1, 4)):
            if body:
                body[rng.randrange(len(body))] = rng.randrange(256)
        _, context = await shared.stream(GENERATE, bytes(body))
        codes.add(context.code.name)
    assert codes <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}, codes
    for method in ("fathom.v1.Models/Get", "fathom.v1.Models/List", SCORE, "grpc.health.v1.Health/Check"):
        for _ in range(100):
            _, context = await shared.unary(method, rng.randbytes(rng.randrange(30)))
            assert context.code.name in {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}, (method, context)


async def test_models_and_health(folder: Path) -> None:
    async with house(folder) as h:
        listed, _ = await h.unary("fathom.v1.Models/List", models_pb2.ListModelsRequest())
        (model,) = listed.models
        assert (model.name, model.family, model.slots, model.replicas, model.max_depth) == (
            "tiny",
            "gla",
            8,
            1,
            1,
        )
        assert model.has_tokenizer and model.vocab_size == 300 and list(model.eos_token_ids) == [0]
        one, _ = await h.unary("fathom.v1.Models/Get", models_pb2.GetModelRequest(name="tiny"))
        assert one == model
        for service in ("", "fathom.v1.Inference", "grpc.health.v1.Health"):
            state, _ = await h.unary(
                "grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service=service)
            )
            assert state.status == health_pb2.HealthCheckResponse.SERVING
        _, context = await h.unary(
            "grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="nope")
        )
        assert context.code is grpc.StatusCode.NOT_FOUND
        await h.replicas[0].stop()
        async with asyncio.timeout(5):
            while h.fleet.replicas():
                await asyncio.sleep(0.01)
        state, _ = await h.unary(
            "grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="fathom.v1.Inference")
        )
        assert state.status == health_pb2.HealthCheckResponse.NOT_SERVING
        _, context = await h.stream(GENERATE, ask())
        assert context.code is grpc.StatusCode.UNAVAILABLE


async def test_several_models_and_an_empty_name(tmp_path: Path, folder: Path) -> None:
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    async with house(folder, other) as h:
        _, context = await h.stream(GENERATE, ask())
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT and "other, tiny" in context.details
        texts = set()
        for name in ("tiny", "other"):
            request = ask()
            request.model = name
            messages, _ = await h.stream(GENERATE, request)
            texts.add("".join(m.text for m in messages))
        assert len(texts) == 2


async def test_a_stranger_cannot_use_the_stream_of_a_replica(folder: Path) -> None:
    from protos.fathom.internal.v1 import engine_pb2, engine_pb2_grpc

    async with house(folder) as h:
        address = h.fleet.replicas()[0].entry.address
        async with grpc.aio.insecure_channel(address) as channel:
            for metadata in ((), (("x-fathom-token", "guess"),)):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await engine_pb2_grpc.EngineStub(channel).Metrics(
                        engine_pb2.MetricsRequest(), metadata=metadata
                    )
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_step_that_fails_costs_what_ran_and_nothing_after(folder: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    async with house(folder) as h:
        runner = h.replicas[0]._engine.runner
        run, failing = runner.run, [True]

        def broken(*args):  # type: ignore[no-untyped-def]
            if failing.pop() if failing else False:
                raise RuntimeError("out of memory, say")
            return run(*args)

        monkeypatch.setattr(runner, "run", broken)
        _, context = await h.stream(GENERATE, ask())
        assert context.code is grpc.StatusCode.INTERNAL
        messages, context = await h.stream(GENERATE, ask())
        assert context.code is grpc.StatusCode.OK and messages
        await h.idle()
