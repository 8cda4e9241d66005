"""Sessions over gRPC: turns compute only what is new, and what is kept is only ever given to its owner, whole."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import sessions_pb2 as sessions
from serving import LLM, SamplingParams
from serving.config import GatewaySpec
from serving.engine.core import Result, Tick
from serving.engine.paths import PathTable
from serving.engine.rows import Rows
from tests import tiny
from tests.gateway.harness import House, house

GENERATE = "fathom.v1.Inference/Generate"
SESSIONS = "fathom.v1.Sessions/"
MODELS: dict[str, dict[str, Any]] = {"gla": tiny.GLA, "looped gla": tiny.LOOPED}


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny", MODELS[request.param])


@asynccontextmanager
async def served(folder: Path, store: Path, **spec: object) -> AsyncIterator[House]:
    async with house(folder, gateway=GatewaySpec(state_store=str(store), max_sessions=20), **spec) as h:
        yield h


async def create(h: House, **given: Any) -> str:
    session, context = await h.unary(SESSIONS + "Create", sessions.CreateSessionRequest(**given))
    assert context.code is grpc.StatusCode.OK, context.details
    return str(session.session_id)  # type: ignore[attr-defined]


async def turn(
    h: House, session_id: str, ids: list[int], **sampling: Any
) -> tuple[list[int], pb.Usage, grpc.StatusCode]:
    options = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **sampling}
    request = pb.GenerateRequest(session_id=session_id, sampling=pb.SamplingParams(**options))
    if ids:
        request.tokens.ids.extend(ids)
    messages, context = await h.stream(GENERATE, request)
    usage = messages[-1].usage if messages else pb.Usage()
    return [i for m in messages for i in m.token_ids], usage, context.code


def alone(folder: Path, prompt: list[int], count: int = 6) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return LLM(folder, dtype="float32", slots=2).generate([prompt], params)[0].token_ids


async def test_a_conversation_computes_what_is_new_and_says_what_it_would_at_once(
    folder: Path, tmp_path: Path
) -> None:
    async with served(folder, tmp_path / "store") as h:
        session_id = await create(h)
        history: list[int] = []
        for number in range(20):
            new = [(7 * number + i) % 290 + 1 for i in range(9)]
            ids, usage, code = await turn(h, session_id, new)
            assert code is grpc.StatusCode.OK
            known = len(history) - 1 if history else 0
            assert usage.prompt_tokens == len(history) + 9
            assert usage.cached_tokens == known  # all but the last token, which had not been fed yet
            history += new + ids
        assert alone(folder, history[:-6]) == history[-6:]
        kept, _ = await h.unary(SESSIONS + "Get", sessions.GetSessionRequest(session_id=session_id))
        assert kept.tokens == len(history) and kept.turns == 20  # type: ignore[attr-defined]
        await h.idle()


async def test_a_session_outlives_the_server(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path / "store") as h:
        session_id = await create(h)
        first, _, _ = await turn(h, session_id, list(range(1, 40)))
    async with served(folder, tmp_path / "store") as h:
        second, usage, code = await turn(h, session_id, [5, 6, 7])
        assert code is grpc.StatusCode.OK
        assert usage.cached_tokens == 39 + 6 - 1
    assert second == alone(folder, [*range(1, 40), *first, 5, 6, 7])


async def test_forks_share_one_prefill(folder: Path, tmp_path: Path) -> None:
    prompt = [i % 290 + 1 for i in range(500)]
    async with served(folder, tmp_path / "store") as h:
        session_id = await create(h)
        first, usage, _ = await turn(h, session_id, prompt)
        assert usage.cached_tokens == 0
        seen = set()
        for number in range(8):
            fork, _ = await h.unary(SESSIONS + "Fork", sessions.ForkSessionRequest(session_id=session_id))
            ids, usage, _ = await turn(h, fork.session_id, [number + 1])  # type: ignore[attr-defined]
            assert usage.cached_tokens == 500 + 6 - 1
            assert ids == alone(folder, [*prompt, *first, number + 1])
            seen.add(tuple(ids))
        assert len(seen) > 1


async def test_eight_continuations_of_ten_thousand_tokens_cost_one_prefill(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the model runs, without a prefix cache that could have saved it; all at once."""
    prompt = [i * i % 290 + 1 for i in range(10_000)]
    async with served(folder, tmp_path / "store", prefill_tokens=2048, prefix_cache_mb=0) as h:
        runner, read = h.replicas[0]._engine.runner, []
        run = runner.run

        def counted(tick: Tick, rows: Rows, paths: PathTable) -> Result:
            if tick.final:
                read.extend(len(chunk.ids) for chunk in tick.chunks)
            return run(tick, rows, paths)

        monkeypatch.setattr(runner, "run", counted)
        session_id = await create(h)
        await turn(h, session_id, prompt, max_tokens=1)
        assert sum(read) == 10_000
        forks = [
            await h.unary(SESSIONS + "Fork", sessions.ForkSessionRequest(session_id=session_id))
            for _ in range(8)
        ]
        told = await asyncio.gather(
            *(turn(h, fork.session_id, [number + 1]) for number, (fork, _) in enumerate(forks))  # type: ignore[attr-defined]
        )
        assert {(usage.prompt_tokens, usage.cached_tokens) for _, usage, _ in told} == {(10_002, 10_000)}
        assert sum(read) == 10_000 + 8 * 2, "of each the token that was not fed yet, and the new one"
        assert len({tuple(ids) for ids, _, _ in told}) > 1
        read.clear()
        request = pb.GenerateRequest(
            tokens=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(n=8, max_tokens=2)
        )
        _, context = await h.stream(GENERATE, request)
        assert context.code is grpc.StatusCode.OK and sum(read) == 10_000, "n = 8 without a session, likewise"
        await h.idle()


async def test_a_snapshot_is_a_point_to_come_back_to(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path / "store") as h:
        session_id = await create(h)
        await turn(h, session_id, list(range(1, 30)))
        snapshot, _ = await h.unary(
            SESSIONS + "Snapshot", sessions.SnapshotSessionRequest(session_id=session_id)
        )
        then, _, _ = await turn(h, session_id, [3, 4])
        await turn(h, session_id, [9, 9])
        await h.unary(SESSIONS + "Delete", sessions.DeleteSessionRequest(session_id=session_id))
        restored, context = await h.unary(
            SESSIONS + "Restore",
            sessions.RestoreSessionRequest(snapshot_id=snapshot.snapshot_id),  # type: ignore[attr-defined]
        )
        assert context.code is grpc.StatusCode.OK
        again, _, _ = await turn(h, restored.session_id, [3, 4])  # type: ignore[attr-defined]
        assert again == then
        listed, _ = await h.unary(SESSIONS + "List", sessions.ListSessionsRequest())
        assert len(listed.sessions) == len(listed.snapshots) == 1  # type: ignore[attr-defined]


async def test_a_turn_that_is_not_complete_leaves_the_session_as_it_was(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path / "store") as h:
        session_id = await create(h)
        await turn(h, session_id, [1, 2, 3])
        request = pb.GenerateRequest(
            session_id=session_id, text="def f", sampling=pb.SamplingParams(max_tokens=5000, ignore_eos=True)
        )
        from tests.gateway.harness import Context, call

        stream = h.rpc.stream(call(GENERATE, request), Context())
        await anext(stream)
        _, _, code = await turn(h, session_id, [1])
        assert code is grpc.StatusCode.FAILED_PRECONDITION  # it is in use
        await stream.aclose()
        kept, _ = await h.unary(SESSIONS + "Get", sessions.GetSessionRequest(session_id=session_id))
        assert kept.tokens == 3 + 6  # type: ignore[attr-defined]
        _, _, code = await turn(h, session_id, [1], n=2)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        _, _, code = await turn(h, session_id, [])  # goes on without anything new
        assert code is grpc.StatusCode.OK
        await h.idle()


async def test_a_stop_string_ends_a_turn_where_its_client_saw_it_end(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path / "store") as h:
        session_id = await create(h)
        prompt = [i % 290 + 1 for i in range(60)]
        free = alone(folder, prompt, 40)
        text = tiny.tokenizer().decode(free)
        stop = next(text[i : i + 2] for i in range(8, len(text) - 2) if text.find(text[i : i + 2]) == i)
        ids, _, _ = await turn(h, session_id, prompt, max_tokens=40, stop=[stop])
        assert 0 < len(ids) < 40 and ids == free[: len(ids)]
        after, _, code = await turn(h, session_id, [7])
        assert code is grpc.StatusCode.OK
        assert after == alone(folder, [*prompt, *ids, 7])


async def test_what_cannot_be_used_is_refused_and_disturbs_nobody(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    other = tiny.checkpoint(tmp_path / "elsewhere" / "tiny", MODELS["gla"], seed=9)
    async with served(folder, store) as h:
        good, bad = await create(h), await create(h)
        for session_id in (good, bad):
            await turn(h, session_id, [1, 2, 3])
        (state,) = store.rglob(f"{bad}.*.safetensors")
        whole = state.read_bytes()
        for damaged in (whole[:-9], whole[:40], b"", bytes([whole[0] ^ 1]) + whole[1:], _flip(whole, -5)):
            state.write_bytes(damaged)
            _, _, code = await turn(h, bad, [4])
            assert code is grpc.StatusCode.DATA_LOSS
        state.unlink()
        assert (await turn(h, bad, [4]))[2] is grpc.StatusCode.DATA_LOSS
        (record,) = store.rglob(f"{bad}.json")
        record.write_bytes(record.read_bytes().replace(b'"turns": 1', b'"turns": 2'))
        assert (await turn(h, bad, [4]))[2] is grpc.StatusCode.DATA_LOSS
        for unknown in ("nonesuch-session", "../../etc/passwd", "a", "x" * 200):
            assert (await turn(h, unknown, [4]))[2] is grpc.StatusCode.NOT_FOUND
        assert (await turn(h, good, [4]))[2] is grpc.StatusCode.OK
        await h.idle()
    async with served(other, store) as h:  # the same name, other weights
        assert (await turn(h, good, [4]))[2] is grpc.StatusCode.FAILED_PRECONDITION
    async with served(folder, store, dtype="bfloat16") as h:
        assert (await turn(h, good, [4]))[2] is grpc.StatusCode.FAILED_PRECONDITION


def _flip(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 0x10
    return bytes(changed)


async def test_quota_and_time_to_live(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path / "store") as h:
        brief = await create(h, ttl_s=0.05)
        for _ in range(19):
            await create(h)
        await asyncio.sleep(0.06)
        assert (await turn(h, brief, [4]))[2] is grpc.StatusCode.NOT_FOUND
        await create(h)  # in its place
        _, context = await h.unary(SESSIONS + "Create", sessions.CreateSessionRequest())
        assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for ttl in (0.0, -1.0, float("nan"), 1e12):
            _, context = await h.unary(SESSIONS + "Create", sessions.CreateSessionRequest(ttl_s=ttl))
            assert context.code is grpc.StatusCode.INVALID_ARGUMENT and "ttl_s" in context.details
