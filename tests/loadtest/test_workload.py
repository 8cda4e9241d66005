"""What is asked: prompts, lengths, sessions and depth policies."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import depth
from loadtest.core import Model, Request, Sample
from loadtest.errors import FlagError
from loadtest.prompts import TextPrompts, TokenPrompts, read_prompts
from loadtest.transports.fathom import depth_policy
from loadtest.workload import Session, Workload
from protos.fathom.v1 import inference_pb2
from tests.loadtest.virtual import a_run

TINY = Model("tiny", vocab_size=50, max_tokens=1000, eos_token_ids=(0, 7))


def taken(workload: Workload, count: int) -> list[Request]:
    return [session.next() for session in islice(workload.sessions(), count)]


def asked(model: Model = TINY, count: int = 20, **flags: Any) -> list[Request]:
    return taken(Workload(a_run(**flags), model), count)


@given(st.integers(1, 300), st.integers(0, 20), st.integers(0, 2**32))
def test_token_prompts_have_their_length_and_none_that_ends_a_text(
    length: int, shared: int, seed: int
) -> None:
    prompts = TokenPrompts(50, [0, 7], shared, np.random.default_rng(seed))
    first, second = prompts.of_length(length), prompts.of_length(length)
    assert len(first) == len(second) == length
    assert not {0, 7} & {*first, *second} and max(first + second) < 50
    assert first[:shared] == second[:shared]
    if length >= shared + 8:
        assert first != second


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True), st.integers(8, 40))
def test_equal_blocks_are_equal_tokens(blocks: list[int], size: int) -> None:
    prompts = TokenPrompts(50, [], 0, np.random.default_rng(0))
    length = size * len(blocks) - 3
    first, second = (
        prompts.of_blocks(length, blocks, size),
        prompts.of_blocks(length, [*blocks[:-1], 10**7], size),
    )
    assert len(first) == len(second) == length
    assert first == prompts.of_blocks(length, blocks, size)
    same = size * (len(blocks) - 1)
    assert first[:same] == second[:same] and first[same:] != second[same:]


@given(st.integers(1, 400))
def test_text_of_a_length_has_as_many_words(length: int) -> None:
    assert len(TextPrompts((), np.random.default_rng(0)).of_length(length).split()) == length


def test_built_in_prompts_differ_and_given_ones_are_sent_as_they_are() -> None:
    assert len({request.text for request in asked(count=100)}) == 100
    assert [request.text for request in asked(prompt=("a", "b"), count=5)] == ["a", "b", "a", "b", "a"]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('plain text\n\n"a\\nb"\n{"prompt": "from an object"}\n{not JSON\n')
    assert read_prompts(file) == ("plain text", "a\nb", "from an object", "{not JSON")
    file.write_text('{"question": 1}\n')
    with pytest.raises(FlagError, match="line 1: an object must have a string `prompt`"):
        read_prompts(file)


def test_the_seed_draws_the_same_requests() -> None:
    def content(seed: int) -> list[tuple[Any, ...]]:
        requests = asked(seed=seed, synthetic="azure-conv", depth=("full:0.3", "fixed=1:0.7"), rate=1.0)
        return [(r.tokens, r.max_tokens, r.depth, r.seed) for r in requests]

    assert content(5) == content(5) != content(6)


def test_lengths_are_exact_and_within_the_model() -> None:
    assert {len(r.tokens or ()) for r in asked(input_tokens=17)} == {17}
    assert {r.max_tokens for r in asked()} == {64}
    for request in asked(synthetic="mooncake-conv", rate=1.0, count=500):
        assert request.prompt_tokens + request.max_tokens <= TINY.max_tokens
    assert all(r.text and r.tokens is None for r in asked(Model("no vocabulary"), input_tokens=9))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"max_tokens": 1001}, "--max-tokens 1001: 1001 are over the 1000 tokens that the model takes"),
        ({"input_tokens": 990, "max_tokens": 11}, "--input-tokens 990: prompts of 990 and 11 more are over"),
        ({"input_tokens": 300, "max_tokens": 60, "turns": 3}, "over the 333 .* in each of 3 turns"),
        ({"depth": ("router",)}, "--depth router: tiny follows full, fixed"),
        ({"depth": ("fixed=5",)}, "--depth fixed=5: must be at most 4, the depth of tiny"),
        ({"input_tokens": 3, "vocab_size": 2}, None),
    ],
)
def test_what_the_model_cannot_take(flags: dict[str, Any], complaint: str | None) -> None:
    model = replace(TINY, eos_token_ids=(0,), depth_policies=("full", "fixed"), max_depth=4)
    if complaint is None:
        assert {token for r in asked(model, **flags) for token in r.tokens or ()} == {1}
        return
    with pytest.raises(FlagError, match=complaint):
        Workload(a_run(**flags), model)


def test_a_model_without_a_tokenizer_gets_ids() -> None:
    model = Model("ids", vocab_size=50, has_tokenizer=False)
    assert all(r.tokens and not r.text for r in asked(model))
    with pytest.raises(FlagError, match="--prompt: ids has no tokenizer"):
        asked(model, prompt=("a",))


def test_later_turns_begin_with_all_that_came_before() -> None:
    (session,) = islice(Workload(a_run(turns=3, input_tokens=10), TINY).sessions(), 1)
    answered: list[int] = []
    prompts: list[int] = []
    last = None
    while session.more:
        new = session.turns[session.turn + 1].tokens
        request = session.next(last)
        assert new is not None and request.tokens == [*prompts, *answered, *new]
        prompts, answered = request.tokens, [session.turn] * 2
        last = Sample(0.0, 2, tokens=answered)
    assert session.turn == 2 and not session.keep


def test_turns_of_a_session_name_it_and_send_only_what_is_new() -> None:
    sessions = list(islice(Workload(a_run(turns=2, input_tokens=10, history="session"), TINY).sessions(), 2))
    names = [{turn.session_id for turn in session.turns} for session in sessions]
    assert all(len(name) == 1 for name in names) and names[0] != names[1]
    assert not sessions[0].keep and [len(turn.tokens or ()) for turn in sessions[0].turns] == [10, 10]


def test_text_turns() -> None:
    first, second = asked(prompt=("A", "B"), count=2)
    session = Session([first, second], resend=True)
    session.next()
    assert session.keep and session.next(Sample(0.0, 1, text="+")).text == "A+B"


# -- depth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wire"),
    [
        ("full", {"full": {}}),
        ("router", {"router": {}}),
        ("deadline", {"deadline": {}}),
        ("fixed=2", {"fixed": 2}),
        ("gate", {"gate": {}}),
        ("gate=0.9", {"gate": {"threshold": 0.9}}),
        ("confidence=margin,0.2", {"confidence": {"measure": "MARGIN", "threshold": 0.2}}),
        ("converged=minp_kl", {"converged": {"measure": "MINP_KL"}}),
        ("chain=0-2-2-1", {"chain": {"layers": [0, 2, 2, 1]}}),
    ],
)
def test_every_policy_reaches_the_wire(text: str, wire: dict[str, Any]) -> None:
    mixture = depth.parse([text], min_depth=1, max_depth=3)
    assert mixture is not None
    assert depth_policy(mixture.depths[0]) == inference_pb2.DepthPolicy(**wire, min_depth=1, max_depth=3)
    assert mixture.depths[0].label == text


def test_shares_of_a_mixture() -> None:
    requests = asked(depth=("full:1", "fixed=2:3"), count=2000)
    deep = sum(r.depth is not None and r.depth.policy == "full" for r in requests)
    assert deep == pytest.approx(500, abs=60)


WRONG = "- deep fixed fixed=0 fixed=x full=3 chain= gate=high full:-1 full:0 full:nan full:x confidence=kl"


@pytest.mark.parametrize("text", ["", *WRONG.split()])
def test_a_policy_that_is_none(text: str) -> None:
    with pytest.raises(FlagError, match="--depth"):
        depth.parse([text])
