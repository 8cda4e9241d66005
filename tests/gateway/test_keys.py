"""API keys: who gets in, to which model, and how much of it."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import httpx
import pytest
import yaml

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc, models_pb2
from protos.fathom.v1 import sessions_pb2 as sessions
from protos.inference import grpc_service_pb2 as wire
from serving import SamplingParams
from serving.config import GatewaySpec
from serving.errors import InvalidArgumentError, OverloadedError, ServeConfigError, UnauthenticatedError
from serving.gateway import keys as module
from serving.gateway.fleet import Fleet
from serving.gateway.http import make_app
from serving.gateway.keys import Keys, credential_of, digest, new_secret
from serving.gateway.replicas import Replica
from serving.gateway.requests import Ask, Requests
from serving.gateway.rpc import WORK
from serving.logs import JsonLines, log_request
from tests import tiny
from tests.gateway.harness import Context, House, call, house
from tests.gateway.ingress import grpc_port, http_port, patient  # noqa: F401  (used by being here)

GENERATE = "fathom.v1.Inference/Generate"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def write(file: Path, *entries: dict[str, object]) -> Path:
    file.write_text(yaml.safe_dump({"keys": list(entries)}))
    return file


def test_a_key_is_known_by_its_digest_alone(tmp_path: Path) -> None:
    secret = new_secret()
    keys = Keys(write(tmp_path / "keys.yaml", {"name": "ann", "sha256": digest(secret)}))
    assert keys.authenticate(secret).name == "ann"
    for wrong in ("", "fathom-", secret[:-1], secret + "x", digest(secret)):
        with pytest.raises(UnauthenticatedError) as refused:
            keys.authenticate(wrong)
        assert not wrong or wrong not in str(refused.value)  # a secret is never said back


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, clock: Clock) -> None:
    file = write(tmp_path / "keys.yaml", {"name": "ann", "sha256": digest("a")})
    keys = Keys(file)
    ann = keys.authenticate("a")
    write(file, {"name": "ann", "sha256": digest("a")}, {"name": "bob", "sha256": digest("b")})
    os.utime(file, ns=(1, 1))
    clock.now += 2
    assert keys.authenticate("b").name == "bob"
    assert keys.authenticate("a") is ann  # and what it uses at present is not forgotten
    file.write_text("keys: [")
    clock.now += 2
    assert keys.authenticate("b").name == "bob"  # a file that cannot be read changes nothing
    write(file, {"name": "bob", "sha256": digest("b")})
    clock.now += 2
    with pytest.raises(UnauthenticatedError):
        keys.authenticate("a")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("keys: [{name: ann}]", "sha256"),
        ("keys: [{name: ann, sha256: abc}]", "sha256"),
        (f"keys: [{{name: ann, sha256: {'a0' * 32}, colour: red}}]", "colour"),
        (f"keys: [{{name: ann, sha256: {'a0' * 32}}}, {{name: bob, sha256: {'a0' * 32}}}]", "twice"),
        ("[]", "keys.yaml"),
        ("keys: [", "keys.yaml"),
    ],
)
def test_an_impossible_file_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ServeConfigError, match=named):
        Keys(file)
    with pytest.raises(ServeConfigError, match="missing"):
        Keys(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "keys: [{name: ann, sha256: SECRET}]",
        "keys: [SECRET]",
        "SECRET",
        "keys:\n- name: ann\n  sha256: 'SECRET\n",
        "keys: [{name: ann, sha256: @SECRET}]",
    ],
)
def test_a_key_in_place_of_its_digest_is_not_said_back(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    secret, file = new_secret(), tmp_path / "keys.yaml"
    file.write_text(text.replace("SECRET", secret))
    with pytest.raises(ServeConfigError) as refused:
        Keys(file)
    assert secret not in str(refused.value)
    keys = Keys(write(file, {"name": "ann", "sha256": digest("a")}))
    file.write_text(text.replace("SECRET", secret))
    clock.now += 2
    assert keys.authenticate("a").name == "ann"
    assert "the keys stay as they were" in caplog.text and secret not in caplog.text


def test_a_changed_quota_does_not_forget_what_is_used(tmp_path: Path, clock: Clock) -> None:
    entry = {"name": "ann", "sha256": digest("a"), "max_streams": 3, "tokens_per_minute": 600}
    keys = Keys(write(tmp_path / "keys.yaml", entry))
    with keys.authenticate("a").stream(600):
        write(tmp_path / "keys.yaml", {**entry, "max_streams": 1, "tokens_per_minute": 1200})
        clock.now += 2
        with pytest.raises(OverloadedError, match="max_streams = 1"), keys.authenticate("a").stream(1):
            pass
    with keys.authenticate("a").stream(1000):
        pass
    with pytest.raises(OverloadedError, match="1200 are spent"), keys.authenticate("a").stream(1):
        pass


def test_quotas(tmp_path: Path, clock: Clock) -> None:
    entry = {"name": "ann", "sha256": digest("a"), "max_streams": 2, "tokens_per_minute": 600}
    ann = Keys(write(tmp_path / "keys.yaml", entry)).authenticate("a")
    with (
        ann.stream(100),
        ann.stream(100),
        pytest.raises(OverloadedError, match="max_streams = 2"),
        ann.stream(1),
    ):
        pass
    ann.spend(500)  # more than there were: what ran was let through
    with pytest.raises(OverloadedError, match="tokens_per_minute = 600"), ann.stream(1):
        pass
    clock.now += 11  # 10 tokens a second, and 100 too many were spent
    with ann.stream(1):
        pass
    clock.now += 3600
    ann._fill()
    assert ann._tokens == 600  # no more than a minute's are saved up


def test_a_priority_is_for_those_who_may_have_it(tmp_path: Path) -> None:
    entries = (
        {"name": "ann", "sha256": digest("a"), "max_priority": 5},
        {"name": "bob", "sha256": digest("b")},
    )
    keys = Keys(write(tmp_path / "keys.yaml", *entries))
    keys.authenticate("a").check_priority(5)
    keys.authenticate("b").check_priority(100)
    for key, priority, limit in (
        ("a", 6, "-100 to 5 for the key 'ann'"),
        ("b", 101, "to 100"),
        ("a", -101, "-100"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"priority = {priority}.*{limit}"):
            keys.authenticate(key).check_priority(priority)


async def test_a_crowd_through_another_gateway_does_not_shut_the_door(tmp_path: Path) -> None:
    """Ann fills the queue through one gateway; Bob, alone at the other, has his share of it, and no more."""
    file = write(tmp_path / "keys.yaml", *({"name": n, "sha256": digest(n)} for n in ("ann", "bob")))
    spec = GatewaySpec(keys_file=str(file))
    async with house(tiny.checkpoint(tmp_path / "one"), gateway=spec, slots=2, max_waiting=8) as h:
        (replica,) = h.fleet.replicas()
        fleet = Fleet(["one"])
        fleet.update([replica.entry])
        while not fleet.replicas():
            await asyncio.wait_for(fleet.changed(), 60)
        other = House(fleet, Requests(fleet, spec), h.rpc, h.metrics)
        endless = SamplingParams(max_tokens=1_000_000, ignore_eos=True)

        async def run(house: House, key: str) -> None:
            async for _ in house.requests.generate(Ask("def f", params=endless, credential=key)):
                pass

        async def until(check: Callable[[], bool]) -> None:
            async with asyncio.timeout(20):
                while not check():
                    await asyncio.sleep(0.01)

        anns = [asyncio.create_task(run(h, "ann")) for _ in range(2)]
        await until(lambda: replica.load.running == 2)
        anns += [asyncio.create_task(run(h, "ann")) for _ in range(8)]
        await until(lambda: fleet.replicas()[0].load.crowd_waiting == 8)
        bobs = []
        for count in range(1, 5):
            bobs.append(asyncio.create_task(run(other, "bob")))
            await until(lambda: sum(task.done() for task in anns) == count)  # noqa: B023
            await until(lambda: fleet.replicas()[0].load.crowd_waiting == 8 - count)  # noqa: B023
        with pytest.raises(OverloadedError):
            await run(other, "bob")
        assert not any(task.done() for task in bobs)
        for task in (*anns, *bobs):
            task.cancel()
        told = await asyncio.gather(*anns, *bobs, return_exceptions=True)
        assert sum(isinstance(one, OverloadedError) for one in told) == 4
        await fleet.close()


async def test_a_full_queue_is_told_at_the_door_and_to_nobody_who_may_have_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything has been read: what Ann sends there is nonsense. Strangers are told that they are strangers."""
    file = write(tmp_path / "keys.yaml", *({"name": n, "sha256": digest(n)} for n in ("ann", "bob")))
    spec = GatewaySpec(keys_file=str(file))
    async with (
        house(tiny.checkpoint(tmp_path / "one"), gateway=spec) as h,
        grpc_port(h.rpc) as address,
        grpc.aio.insecure_channel(address) as channel,
        http_port(make_app(h.requests, h.fleet, spec, h.metrics)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        monkeypatch.setattr(Replica, "room", 0)
        monkeypatch.setattr(Replica, "yields", lambda self, owner, running: owner == "bob")
        told: list[bool] = []
        monkeypatch.setattr(Replica, "refuse", lambda self: told.append(True))

        async def code(path: str, key: str, body: bytes) -> grpc.StatusCode:
            answers = channel.unary_stream(path)(body, metadata=(("authorization", f"Bearer {key}"),))
            with suppress(grpc.aio.AioRpcError):
                async for _ in answers:
                    pass
            return await answers.code()  # type: ignore[no-any-return]

        async def status(path: str, key: str, body: str) -> int:
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            return (await client.post(path, content=body, headers=headers)).status_code

        for number, path in enumerate(WORK, 1):
            assert await code(path, "ann", b"\xff") is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await code(path, "bob", b"\xff") is grpc.StatusCode.INVALID_ARGUMENT
            assert len(told) == number
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
            assert (await status(path, "ann", "{"), await status(path, "bob", "{")) == (429, 400)
        sound = pb.GenerateRequest(text="def f", sampling=pb.SamplingParams(max_tokens=2))
        generate = f"/{GENERATE}"
        assert await code(generate, "bob", sound.SerializeToString()) is grpc.StatusCode.OK
        assert await code(generate, "eve", sound.SerializeToString()) is grpc.StatusCode.UNAUTHENTICATED
        assert await status("/v1/completions", "eve", '{"prompt": "a"}') == 401
        assert await code("/fathom.v1.Models/List", "ann", b"") is grpc.StatusCode.OK
        await h.idle()


def test_a_key_comes_as_a_bearer_or_as_a_header_of_its_own() -> None:
    assert credential_of({"authorization": "Bearer abc"}) == "abc"
    assert credential_of({"authorization": "bearer  abc "}) == "abc"
    assert credential_of({"x-api-key": "abc"}) == "abc"
    assert credential_of({"authorization": "Basic abc"}) == credential_of({}) == ""


async def ask(h: House, key: str, model: str = "one") -> grpc.StatusCode:
    context = Context(metadata=(("authorization", f"Bearer {key}"),) if key else ())
    request = pb.GenerateRequest(model=model, text="def f", sampling=pb.SamplingParams(max_tokens=2))
    try:
        async for _ in h.rpc.stream(call(GENERATE, request), context):
            pass
    except Exception:
        assert context.code is not grpc.StatusCode.OK
    return context.code


async def test_over_grpc(tmp_path: Path) -> None:
    one, two = tiny.checkpoint(tmp_path / "one"), tiny.checkpoint(tmp_path / "two", seed=1)
    file = write(
        tmp_path / "keys.yaml",
        {"name": "ann", "sha256": digest("a")},
        {"name": "bob", "sha256": digest("b"), "models": ["two"]},
        {"name": "none", "sha256": digest("n"), "max_streams": 0},
    )
    spec = GatewaySpec(keys_file=str(file), state_store=str(tmp_path / "store"))
    async with house(one, two, gateway=spec) as h:
        assert await ask(h, "a") is grpc.StatusCode.OK
        assert await ask(h, "b", "two") is grpc.StatusCode.OK
        assert await ask(h, "b") is grpc.StatusCode.PERMISSION_DENIED
        assert await ask(h, "n") is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await ask(h, "") is grpc.StatusCode.UNAUTHENTICATED
        assert await ask(h, "c") is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(UnauthenticatedError):
            await h.requests.score(Ask("def f", model="one"))

        async def unary(method: str, key: str, request: object) -> tuple[object, Context]:
            context = Context(metadata=(("x-api-key", key),))
            return await h.rpc.unary(call(method, request), context), context  # type: ignore[arg-type]

        listed, _ = await unary("fathom.v1.Models/List", "b", models_pb2.ListModelsRequest())
        assert [m.name for m in listed.models] == ["two"]  # type: ignore[attr-defined]
        _, context = await unary("fathom.v1.Models/Get", "b", models_pb2.GetModelRequest(name="one"))
        assert context.code is grpc.StatusCode.PERMISSION_DENIED

        _, context = await unary("fathom.v1.Models/Get", "?", models_pb2.GetModelRequest(name="none"))
        assert context.code is grpc.StatusCode.UNAUTHENTICATED  # and no model is named
        oip = "inference.GRPCInferenceService/"
        index, _ = await unary(oip + "RepositoryIndex", "b", wire.RepositoryIndexRequest())
        assert [m.name for m in index.models] == ["two"]  # type: ignore[attr-defined]
        _, context = await unary(oip + "RepositoryIndex", "?", wire.RepositoryIndexRequest())
        assert context.code is grpc.StatusCode.UNAUTHENTICATED
        _, context = await unary(oip + "ModelMetadata", "b", wire.ModelMetadataRequest(name="one"))
        assert context.code is grpc.StatusCode.PERMISSION_DENIED

        made, _ = await unary("fathom.v1.Sessions/Create", "a", sessions.CreateSessionRequest(model="two"))
        for method, request in (
            ("Get", sessions.GetSessionRequest),
            ("Fork", sessions.ForkSessionRequest),
            ("Snapshot", sessions.SnapshotSessionRequest),
            ("Delete", sessions.DeleteSessionRequest),
        ):
            mine = request(session_id=made.session_id)  # type: ignore[attr-defined]
            _, context = await unary(f"fathom.v1.Sessions/{method}", "b", mine)
            assert context.code is grpc.StatusCode.NOT_FOUND, method
        _, context = await unary("fathom.v1.Sessions/Create", "b", sessions.CreateSessionRequest(model="one"))
        assert context.code is grpc.StatusCode.PERMISSION_DENIED
        await h.idle()


async def test_a_full_gateway_refuses_before_it_has_read_anything(tmp_path: Path) -> None:
    async with house(tiny.checkpoint(tmp_path / "tiny"), gateway=GatewaySpec(max_streams=1)) as h:
        running = h.requests.generate(Ask("def f", params=SamplingParams(max_tokens=200, ignore_eos=True)))
        await anext(running)
        with pytest.raises(OverloadedError, match="1 streams"):  # and not that the prompt is empty
            await anext(h.requests.generate(Ask([])))
        await running.aclose()
        await h.idle()


async def test_no_log_says_a_key_or_a_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of whatever library, at whatever level."""
    caplog.set_level(0)
    for name in ("fathom", "uvicorn", "uvicorn.error", "grpc", "httpx", "asyncio"):
        caplog.set_level(0, name)
    key, prompt = new_secret(), "the-word-that-nobody-may-read"
    file = write(tmp_path / "keys.yaml", {"name": "ann", "sha256": digest(key), "tokens_per_minute": 500})
    spec = GatewaySpec(keys_file=str(file), state_store=str(tmp_path / "store"))
    async with house(tiny.checkpoint(tmp_path / "tiny"), gateway=spec) as h:
        h.requests._listeners = (log_request,)
        app = make_app(h.requests, h.fleet, spec, h.metrics)
        async with (
            grpc_port(h.rpc) as address,
            http_port(app) as url,
            grpc.aio.insecure_channel(address) as channel,
            httpx.AsyncClient(base_url=url, timeout=30) as client,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            for sampling in (
                pb.SamplingParams(max_tokens=2),
                pb.SamplingParams(max_tokens=2, stop=[prompt]),
                pb.SamplingParams(max_tokens=10**9),
                pb.SamplingParams(max_tokens=2, n=500),
                pb.SamplingParams(max_tokens=2, grammar=pb.Grammar(regex=f"({prompt}")),
            ):
                for shown in (key, key + "x"):
                    call = stub.Generate(
                        pb.GenerateRequest(text=prompt, sampling=sampling),
                        metadata=(("authorization", f"Bearer {shown}"),),
                    )
                    with suppress(grpc.aio.AioRpcError):
                        async for _ in call:
                            pass
            for body in (
                {"prompt": prompt, "max_tokens": 2},
                {"prompt": prompt, "max_tokens": 2, "stream": True},
                {"prompt": prompt, "max_tokens": 2, "colour": prompt},
                {"prompt": prompt, "max_tokens": 2, "guided_regex": f"({prompt}"},
                {"prompt": [prompt], "model": prompt, "stop": [prompt]},
                {"prompt": prompt, "max_tokens": 500},
                {"prompt": prompt, "max_tokens": 1},
            ):
                await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
            await client.post("/v1/completions", content=prompt, headers={"x-api-key": key})
        await h.idle()
    logged = "\n".join(JsonLines().format(record) for record in caplog.records)
    assert "generate ok" in logged and "generate failed" in logged
    assert key not in logged
    assert prompt not in logged
