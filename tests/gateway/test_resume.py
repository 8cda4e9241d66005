"""Streams outlive the replica that they began on: the same tokens as if nothing had happened."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protos.fathom.internal.v1 import engine_pb2 as wire
from serving import LLM, SamplingParams
from serving.cluster.death import process_of
from serving.config import GatewaySpec
from serving.engine.core import Tick
from serving.errors import InvalidArgumentError, UnavailableError
from serving.gateway.replicas import MESSAGE_BYTES, SILENCE_S, Outbox
from serving.gateway.requests import Ask
from tests import tiny
from tests.gateway.harness import House, house

MODELS: dict[str, dict[str, Any]] = {"gla": tiny.GLA, "looped gla": tiny.LOOPED}
TEXTS = [f"def f{i}(x):" for i in range(8)]


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny", MODELS[request.param])


def params(**given: object) -> SamplingParams:
    options: dict[str, Any] = {"temperature": 0.9, "seed": 5, "max_tokens": 120, "ignore_eos": True, **given}
    return SamplingParams(**options)


async def kill(h: House) -> None:
    await h.replicas.pop(0).stop()


async def drain(h: House) -> None:
    replica = h.replicas.pop(0)
    await replica.drain(10)
    assert not replica._engine.busy
    await replica.stop()


async def all_streams(
    h: House, interrupt: Callable[[House], Awaitable[None]] | None, **given: object
) -> list[list[list[int]]]:
    """The tokens of each text's continuations; `interrupt` comes when all of them have begun."""
    begun = asyncio.Event()
    running = 0

    async def one(text: str) -> list[list[int]]:
        nonlocal running
        wanted = params(**given)
        ids: list[list[int]] = [[] for _ in range(wanted.n)]
        usage = None
        async for piece in h.requests.generate(Ask(text, params=wanted)):
            ids[piece.index] += piece.news.ids
            usage = piece.news.usage or usage
            if running < len(TEXTS) and len(ids[piece.index]) > 5:
                running += 1
                if running == len(TEXTS):
                    begun.set()
        assert usage is not None and usage.completion_tokens == sum(map(len, ids))
        return ids

    tasks = [asyncio.create_task(one(text)) for text in TEXTS]
    if interrupt is not None:
        await begun.wait()
        await interrupt(h)
    return await asyncio.gather(*tasks)


@pytest.mark.parametrize("interrupt", [kill, drain])
@pytest.mark.parametrize("snapshot_tokens", [0, 16])
async def test_a_replica_that_goes_takes_no_stream_with_it(
    folder: Path, interrupt: Callable[[House], Awaitable[None]], snapshot_tokens: int
) -> None:
    llm = LLM(folder, dtype="float32", slots=8)
    quiet = [[c.token_ids for c in r.outputs] for r in llm.generate(TEXTS, params(n=2))]
    async with house(folder, replicas=2, slots=16, snapshot_tokens=snapshot_tokens) as h:
        assert await all_streams(h, interrupt, n=2) == quiet
        await h.idle()


async def test_no_more_than_the_snapshots_allow_is_computed_again(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "tiny")
    async with house(folder, replicas=2, snapshot_tokens=32, prefix_cache_mb=0) as h:
        read: list[int] = []
        runner = h.replicas[1]._engine.runner  # the other one is going to be killed
        run = runner.run

        def counted(tick: Tick, *rest: Any) -> Any:
            read.append(tick.prefill_tokens)
            return run(tick, *rest)

        runner.run = counted  # type: ignore[method-assign]
        await all_streams(h, kill)
        prompts = sum(len(tiny.tokenizer().encode(text).ids) for text in TEXTS)
        assert 0 < sum(read) <= prompts + len(TEXTS) * 32


async def test_a_replay_is_one_chunk_of_each_stream(folder: Path) -> None:
    """A kept state between them would have the last token of each wait for another tick."""
    async with house(folder, replicas=2, slots=16, snapshot_tokens=0, prefill_tokens=4096) as h:
        chunks: list[tuple[str, int]] = []
        runner = h.replicas[1]._engine.runner
        run = runner.run

        def noted(tick: Tick, *rest: Any) -> Any:
            fresh = [c for c in tick.chunks if c.sequence.request.resumed and c.node == 0]
            chunks.extend((c.sequence.request.id, c.start) for c in fresh)
            return run(tick, *rest)

        runner.run = noted  # type: ignore[method-assign]
        await all_streams(h, kill)
        assert chunks and len({request for request, _ in chunks}) == len(chunks)


async def test_what_a_lost_replica_leaves_goes_to_another_in_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first ones of many keep its engine busy while the others are still on their way."""
    async with house(folder, replicas=2, slots=16, snapshot_tokens=16) as h:
        taken: list[int] = []
        submit = h.replicas[1]._submit

        def counted(submits: Any, link: Any) -> None:
            taken.append(sum(bool(s.resumed) for s in submits))
            submit(submits, link)

        monkeypatch.setattr(h.replicas[1], "_submit", counted)
        await all_streams(h, kill)
        moved = [count for count in taken if count]
        assert len(moved) == 1 and moved[0] > 1


async def test_what_is_large_goes_in_several_messages_and_nothing_is_cancelled_before_it_came() -> None:
    box = Outbox()
    for number in range(5):
        box.submit(wire.Submit(request_id=str(number), state=bytes(MESSAGE_BYTES // 2)))
    box.cancel(wire.Cancel(request_id="4"))
    box.refused()
    messages = box.messages()
    sent = [await anext(messages) for _ in range(3)]
    assert [[s.request_id for s in m.submits] for m in sent] == [["0", "1"], ["2", "3"], ["4"]]
    assert [[c.request_id for c in m.cancels] for m in sent] == [[], [], ["4"]]
    assert [m.refused for m in sent] == [True, False, False]
    more = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0)
    assert not more.done()
    box.cancel(wire.Cancel(request_id="0"))
    assert [c.request_id for c in (await more).cancels] == ["0"]
    await messages.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("asked", "wait"), [(None, 64), (0, 0), (7, 7)])
async def test_small_states_are_sent_often_unless_told_otherwise(
    folder: Path, asked: int | None, wait: int
) -> None:
    async with house(folder, snapshot_tokens=asked) as h:
        assert h.replicas[0]._engine.memory.snapshot_tokens == wait


async def test_a_lost_request_waits_for_a_replica_and_gives_up_in_time(folder: Path) -> None:
    async with house(folder, gateway=GatewaySpec(resume_timeout_s=0.2)) as h:
        with pytest.raises(UnavailableError):
            await all_streams(h, kill)


async def test_at_most_once_fails_instead(folder: Path) -> None:
    async with house(folder, replicas=2, gateway=GatewaySpec(on_replica_loss="fail")) as h:
        with pytest.raises(UnavailableError):
            await all_streams(h, kill)


async def test_a_score_survives(folder: Path) -> None:
    ids = [i % 250 for i in range(2000)]
    async with house(folder, replicas=2, prefill_tokens=32) as h:
        _, quiet = await h.requests.score(Ask(ids))
        task = asyncio.create_task(h.requests.score(Ask(ids)))
        while not (busy := [r for r in h.replicas if r._engine.busy]):
            await asyncio.sleep(0.001)
        await busy[0].stop()
        _, after = await task
        assert after.ids == quiet.ids == ids[1:]
        assert after.logprobs == pytest.approx(quiet.logprobs, abs=1e-5)


async def test_a_client_takes_a_broken_stream_up_again(folder: Path) -> None:
    """With the same request id, and what it has received, at any gateway."""
    async with house(folder) as h:
        ask = Ask("def f(x):", params=params(seed=None, stop=("zzz",)), request_id="mine")
        whole = [piece async for piece in h.requests.generate(ask)]
        ids = [i for piece in whole for i in piece.news.ids]
        lengths = [n for piece in whole for n in piece.lengths]
        text = "".join(piece.text for piece in whole)
        for had in (1, 40, 119):
            again = replace(ask, resumed=ids[:had])
            rest = [piece async for piece in h.requests.generate(again)]
            assert [i for piece in rest for i in piece.news.ids] == ids[had:]
            assert "".join(piece.text for piece in rest) == text[sum(lengths[:had]) :]
        with pytest.raises(InvalidArgumentError, match="resumed_token_ids"):
            async for _ in h.requests.generate(replace(ask, resumed=ids)):
                pass


async def test_a_client_need_not_wait_until_its_broken_stream_has_been_stopped(folder: Path) -> None:
    async with house(folder) as h:
        ask = Ask("def f(x):", params=params(seed=None), request_id="mine")
        whole = [i async for piece in h.requests.generate(ask) for i in piece.news.ids]
        broken, had = h.requests.generate(ask), []
        while len(had) < 5:
            had += (await anext(broken)).news.ids
        again = h.requests.generate(replace(ask, resumed=had))
        rest = list((await anext(again)).news.ids)
        await broken.aclose()
        rest += [i async for piece in again for i in piece.news.ids]
        assert had + rest == whole
        await h.idle()


async def test_a_gateway_that_was_held_up_does_not_believe_in_silence(folder: Path) -> None:
    async with house(folder) as h:
        quiet = await all_streams(h, None)
        replica = h.fleet.replicas()[0]

        async def held_up(_: House) -> None:
            time.sleep(2 * SILENCE_S)

        assert await all_streams(h, held_up) == quiet
        assert h.fleet.replicas() == [replica]
        await h.idle()


async def test_streams_leave_a_dying_process_before_its_sockets_close(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        async with house(folder, replicas=2) as h:
            quiet = await all_streams(h, None)
            first, second = (replica.entry for replica in h.fleet.replicas())
            h.fleet.update([replace(first, process=process_of(child.pid)), second])
            while len(h.fleet.replicas()) < 2:
                await asyncio.wait_for(h.fleet.changed(), 10)

            async def end(h: House) -> None:
                child.kill()

            assert await all_streams(h, end) == quiet
            assert [replica.entry for replica in h.fleet.replicas()] == [second]
