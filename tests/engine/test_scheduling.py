"""The engine's scheduling laws, on a model of integers and virtual time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.paths import Path
from serving.engine.core import Request
from serving.engine.depth import DepthPolicy, ExitReason
from serving.engine.engine import Engine
from serving.engine.news import FinishReason, Output
from serving.engine.params import SamplingParams
from serving.errors import InvalidArgumentError, OverloadedError
from tests.engine.fake import (
    FakeRunner,
    assert_no_leak,
    looped,
    make_engine,
    nested,
    plain,
    reference,
    signal,
)

PATHS = {"plain": plain(), "looped": looped(4), "nested": nested(3)}


def collect(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], Output]:
    """Everything each continuation was given, once all are done."""
    news: dict[tuple[str, int], Output] = {}
    for request in requests:
        engine.submit(request)
    while engine.busy:
        gather(news, engine.step())
    return news


def gather(news: dict[tuple[str, int], Output], outputs: list[Output]) -> None:
    for out in outputs:
        known = news.setdefault((out.request_id, out.index), Output(out.request_id, out.index))
        known.extend(out)


def request(name: str, prompt: list[int], count: int = 5, **options: object) -> Request:
    fields = {k: options.pop(k) for k in ("score", "priority", "deadline") if k in options}
    return Request(name, prompt, SamplingParams(max_tokens=count, **options), **fields)  # type: ignore[arg-type]


prompts = st.lists(st.integers(0, 996), min_size=1, max_size=40)


@given(
    path=st.sampled_from(sorted(PATHS)),
    jobs=st.lists(st.tuples(prompts, st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=12),
    slots=st.integers(1, 5),
    prefill_tokens=st.integers(1, 50),
    threshold=st.floats(0, 1),
)
def test_tokens_and_depths_are_those_of_one_sequence_alone(
    path: str, jobs: list[tuple[list[int], int, int]], slots: int, prefill_tokens: int, threshold: float
) -> None:
    """Whatever the arrivals, the batch, the chunking and the mix of depths."""
    runner = FakeRunner(PATHS[path])
    engine = make_engine(runner, slots, prefill_tokens=prefill_tokens)
    policy = DepthPolicy("full") if path == "plain" else DepthPolicy("gate", threshold=threshold)
    news: dict[tuple[str, int], Output] = {}
    pending = [(steps, request(str(i), p, n, depth=policy)) for i, (p, n, steps) in enumerate(jobs)]
    pending.sort(key=lambda job: job[0])
    step = 0
    while pending or engine.busy:
        while pending and pending[0][0] <= step:
            engine.submit(pending.pop(0)[1])
        gather(news, engine.step())
        step += 1
    for i, (prompt, count, _) in enumerate(jobs):
        ids, depths = reference(PATHS[path], prompt, count, lambda units, hidden: signal(hidden) >= threshold)
        assert news[str(i), 0].ids == ids
        assert news[str(i), 0].depths == (depths if path != "plain" else [1] * count)
        assert news[str(i), 0].finish_reason is FinishReason.LENGTH
    assert_no_leak(engine)


@given(
    jobs=st.lists(st.tuples(prompts, st.integers(0, 60)), min_size=1, max_size=10),
    path=st.sampled_from(sorted(PATHS)),
    n=st.integers(1, 3),
)
def test_cancellation_frees_slots_at_once_and_disturbs_nobody(
    jobs: list[tuple[list[int], int]], path: str, n: int
) -> None:
    engine = make_engine(FakeRunner(PATHS[path]), 4, prefill_tokens=7)
    news: dict[tuple[str, int], Output] = {}
    for i, (prompt, _) in enumerate(jobs):
        engine.submit(request(str(i), prompt, 10, n=n))
    for step in range(61):
        for i, (_, when) in enumerate(jobs):
            if when == step and i % 2:
                gather(news, engine.cancel(str(i)))
                assert str(i) not in engine.scheduler.requests
        gather(news, engine.step())
    while engine.busy:
        gather(news, engine.step())
    for i, (prompt, _) in enumerate(jobs):
        expected, _ = reference(PATHS[path], prompt, 10)
        for index in range(n):
            out = news.get((str(i), index))
            if i % 2 and out is not None:
                assert out.ids == expected[: len(out.ids)]
            elif not i % 2:
                assert out is not None and out.ids == expected
    assert_no_leak(engine)


def test_one_continuation_cancelled_while_it_prefills_for_its_siblings() -> None:
    engine = make_engine(FakeRunner(plain()), 4, prefill_tokens=2)
    news: dict[tuple[str, int], Output] = {}
    engine.submit(request("a", [1, 2, 3, 4, 5], 3, n=3))
    engine.step()
    gather(news, engine.cancel("a", 0))
    while engine.busy:
        gather(news, engine.step())
    expected, _ = reference(plain(), [1, 2, 3, 4, 5], 3)
    assert news["a", 0].finish_reason is FinishReason.CANCELLED and not news["a", 0].ids
    assert news["a", 1].ids == news["a", 2].ids == expected
    assert_no_leak(engine)


def test_running_sequences_are_never_evicted_and_waiting_ones_take_their_turn() -> None:
    engine = make_engine(FakeRunner(plain()), 2)
    news = collect(engine, [request(str(i), [i], 4) for i in range(7)])
    assert all(len(out.ids) == 4 for out in news.values())
    assert_no_leak(engine)


def test_priority_goes_first() -> None:
    engine = make_engine(FakeRunner(plain()), 1)
    order = []
    for name, priority in (("low", -1), ("usual", 0), ("high", 5), ("also high", 5)):
        engine.submit(request(name, [1], 1, priority=priority))
    while engine.busy:
        order += [out.request_id for out in engine.step()]
    assert order == ["high", "also high", "usual", "low"]


def test_prefill_is_interleaved_so_that_decoding_never_waits_for_a_whole_prompt() -> None:
    engine = make_engine(FakeRunner(plain()), 2, prefill_tokens=8)
    engine.submit(request("short", [1], 30))
    engine.step()
    engine.submit(request("long", list(range(100)), 2))
    while "long" in engine.scheduler.requests:
        outputs = engine.step()
        assert any(out.request_id == "short" for out in outputs), (
            "a tick without a token for the decoding row"
        )
        assert engine.runner.ticks[-1][1] <= 8 + 2  # type: ignore[attr-defined]


def test_a_deadline_gives_what_was_ready_and_frees_the_slot() -> None:
    runner = FakeRunner(plain())
    engine = make_engine(runner, 1)
    engine.submit(request("late", [1, 2], 100, deadline=5.5))
    engine.submit(request("never admitted", [1], 100, deadline=3.0))
    engine.submit(request("next", [3], 2))
    news: dict[tuple[str, int], Output] = {}
    while engine.busy:
        gather(news, engine.step())
    assert news["late", 0].finish_reason is FinishReason.DEADLINE
    assert news["late", 0].ids == reference(plain(), [1, 2], 6)[0]
    assert news["never admitted", 0].finish_reason is FinishReason.DEADLINE
    assert not news["never admitted", 0].ids
    assert len(news["next", 0].ids) == 2
    assert_no_leak(engine)


def test_a_full_queue_refuses_and_goes_on() -> None:
    engine = make_engine(FakeRunner(plain()), 1, max_waiting=2)
    engine.submit(request("a", [1], 3))
    engine.step()
    engine.submit(request("b", [1], 3))
    engine.submit(request("c", [1], 3))
    with pytest.raises(OverloadedError, match="2 requests are waiting"):
        engine.submit(request("d", [1], 3))
    while engine.busy:
        engine.step()
    assert_no_leak(engine)


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (lambda: request("x", []), "prompt"),
        (lambda: request("x", [VOCABULARY]), "prompt"),
        (lambda: request("x", [-1]), "prompt"),
        (lambda: request("x", [1] * 101), "prompt"),
        (lambda: request("x", [1], n=5), "n"),
        (lambda: request("x", [1], stop_token_ids=[VOCABULARY]), "stop_token_ids"),
        (lambda: request("x", [1], logit_bias={VOCABULARY: 1.0}), "logit_bias"),
    ],
)
def test_impossible_requests_are_refused_by_field(made, field) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(FakeRunner(plain()), 4, max_tokens=100)
    with pytest.raises(InvalidArgumentError, match=f"^{field} = "):
        engine.submit(made())
    assert_no_leak(engine)


VOCABULARY = 997


def test_scores_come_for_every_token_after_the_first() -> None:
    engine = make_engine(FakeRunner(looped(2)), 2, prefill_tokens=3)
    news = collect(engine, [request("s", list(range(10)), score=True), request("one", [4], score=True)])
    assert len(news["s", 0].logprobs) == 9 and news["s", 0].ids == list(range(1, 10))
    assert news["s", 0].depths == [2] * 9
    assert news["one", 0].logprobs == [] and news["one", 0].finish_reason is FinishReason.STOP
    assert_no_leak(engine)


def test_end_of_text_stops_only_after_min_tokens_and_unless_ignored() -> None:
    ids, _ = reference(plain(), [5], 20)
    eos = ids[3]
    for options, expected in (({}, 4), ({"ignore_eos": True}, 20), ({"min_tokens": 6}, 20)):
        engine = make_engine(FakeRunner(plain()), 1, eos_token_ids=[eos])
        out = collect(engine, [request("a", [5], 20, **options)])["a", 0]
        assert len(out.ids) == (expected if eos not in ids[4:] or not options else len(out.ids))
        assert out.finish_reason is (FinishReason.STOP if expected == 4 else FinishReason.LENGTH)


@pytest.mark.parametrize("path", ["looped", "nested"])
@pytest.mark.parametrize(
    ("policy", "leaves"),
    [
        (DepthPolicy.fixed(2), lambda units, hidden: units >= 2),
        (DepthPolicy.full(max_depth=1), lambda units, hidden: units >= 1),
        (DepthPolicy.gate(0.5, min_depth=2), lambda units, hidden: units >= 2 and signal(hidden) >= 0.5),
        (DepthPolicy("gate", threshold=0.9, max_depth=2), lambda u, h: u >= 2 or signal(h) >= 0.9),
        (DepthPolicy.confidence("entropy", 0.2), lambda units, hidden: signal(hidden) <= 0.2),
    ],
    ids=["fixed", "max", "min", "gate_max", "entropy"],
)
def test_policies_and_bounds(path: str, policy: DepthPolicy, leaves) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(FakeRunner(PATHS[path]), 3, prefill_tokens=5)
    everyone = [request(str(i), [i, i + 1, i + 2], 8, depth=policy) for i in range(6)]
    news = collect(engine, everyone)
    for i in range(6):
        ids, depths = reference(PATHS[path], [i, i + 1, i + 2], 8, leaves)
        assert news[str(i), 0].ids == ids
        assert news[str(i), 0].depths == depths
    assert_no_leak(engine)


def test_requests_with_different_policies_share_ticks() -> None:
    path = looped(6)
    runner = FakeRunner(path)
    engine = make_engine(runner, 8)
    everyone = [request(str(i), [i], 10, depth=DepthPolicy.fixed(1 + i % 6)) for i in range(8)]
    news = collect(engine, everyone)
    for i in range(8):
        assert news[str(i), 0].depths == [1 + i % 6] * 10
        assert set(news[str(i), 0].exit_reasons) == {ExitReason.FIXED_DEPTH}
    core = [tokens for stage, tokens in runner.ticks if stage == 1]
    assert np.mean(core[:10]) > 4, "rows at different depths of the core do not share its ticks"


@pytest.mark.parametrize(("launch", "least"), [(0.0, 0.99), (0.1, 0.95), (0.5, 0.8)])
def test_continuous_depth_wise_batching_nears_the_ideal(launch: float, least: float) -> None:
    """Virtual seconds against (p + D c + q) / (p + d c + q). `launch` is the share of a full batch's cost that a tick
    costs however few its rows; the ideal, with every batch full, cannot be reached where that is large."""
    path: Path = looped(4)
    full_batch = {0: 0.3, 1: 1.0, 2: 0.5}

    def cost(stage: int, tokens: int) -> float:
        return full_batch[stage] * (launch + (1 - launch) * tokens / 32)

    def seconds(policy: DepthPolicy) -> tuple[float, float]:
        runner = FakeRunner(path, cost=cost)
        engine = make_engine(runner, 32)
        news = collect(engine, [request(str(i), [i], 128, depth=policy) for i in range(64)])
        depths = [d for out in news.values() for d in out.depths]
        return runner.clock.now, float(np.mean(depths))

    full, _ = seconds(DepthPolicy.full())
    early, mean_depth = seconds(DepthPolicy.gate(0.5))
    ideal = (0.3 + 4 * 1.0 + 0.5) / (0.3 + mean_depth * 1.0 + 0.5)
    assert full / early > least * ideal


def test_no_row_waits_for_ever() -> None:
    """A lone deep row among many shallow ones, with costs that favour the many."""
    runner = FakeRunner(looped(8), cost=lambda stage, tokens: 0.001 if stage == 1 else 1.0)
    engine = make_engine(runner, 32)
    for i in range(31):
        engine.submit(request(f"shallow{i}", [i], 200, depth=DepthPolicy.fixed(1)))
    engine.submit(request("deep", [5], 5, depth=DepthPolicy.fixed(8)))
    for _ in range(1500):
        if "deep" not in engine.scheduler.requests:
            return
        engine.step()
    raise AssertionError("the deep row starves")


def test_the_deep_rows_of_a_nested_model_keep_up() -> None:
    """Nobody else ever comes to their stages, so that there is nothing to wait for once all of them are there."""
    runner = FakeRunner(nested(3), cost=lambda stage, tokens: 1.0 + 0.05 * tokens)
    engine = make_engine(runner, 8)
    depths = [1, 1, 1, 1, 1, 2, 2, 3]
    for i, depth in enumerate(depths):
        engine.submit(request(str(i), [i], 10_000, depth=DepthPolicy.fixed(depth)))
    made = dict.fromkeys(range(8), 0)
    for _ in range(1000):
        for out in engine.step():
            made[int(out.request_id)] += len(out.ids)
    assert min(made.values()) > 0.9 * max(made.values()), made
