"""Sampling: what each parameter does to the distribution, and that rows never influence each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.params import SamplingParams
from serving.engine.random import derive, uniform
from serving.engine.sampler import Sampler
from serving.errors import InvalidArgumentError

VOCAB = 20


def draw(
    params: SamplingParams,
    logits: torch.Tensor,
    *,
    seed: int = 0,
    count: int = 1,
    prompt: tuple[int, ...] = (),
):  # type: ignore[no-untyped-def]
    """`count` tokens from the same logits, one position after the other."""
    sampler = Sampler(1, VOCAB)
    sampler.admit(1, params, seed, prompt, [0])
    return [int(sampler.sample(logits[None], np.array([1]), np.array([p]))[0][0]) for p in range(count)]


LOGITS = torch.linspace(-2, 3, VOCAB)


def test_frequencies_follow_the_distribution() -> None:
    tokens = draw(SamplingParams(temperature=0.8), LOGITS, count=20_000)
    expected = (LOGITS / 0.8).softmax(0)
    seen = torch.bincount(torch.tensor(tokens), minlength=VOCAB) / len(tokens)
    assert (seen - expected).abs().max() < 0.012


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=0), {19}),
        (SamplingParams(top_k=3), {17, 18, 19}),
        (SamplingParams(top_p=0.01), {19}),
        (SamplingParams(min_p=0.75), {18, 19}),
        (SamplingParams(top_k=5, min_p=0.5), {17, 18, 19}),
        (SamplingParams(temperature=0, logit_bias={4: 100}), {4}),
        (SamplingParams(temperature=0, logit_bias={19: -100}), {18}),
    ],
    ids=str,
)
def test_filters(params: SamplingParams, allowed: set[int]) -> None:
    assert set(draw(params, LOGITS, count=400)) == allowed


def test_top_p_keeps_the_fewest_tokens_that_hold_the_probability() -> None:
    probabilities = LOGITS.softmax(0).flip(0)
    for p in (0.3, 0.6, 0.9):
        needed = int((probabilities.cumsum(0) < p).sum()) + 1
        assert set(draw(SamplingParams(top_p=p), LOGITS, count=2000)) == set(range(VOCAB - needed, VOCAB))


def test_penalties_look_back() -> None:
    flat = torch.zeros(VOCAB)
    flat[3] = flat[5] = 1.0
    greedy = {"temperature": 0}
    assert draw(SamplingParams(**greedy, presence_penalty=2), flat, count=3)[:2] == [3, 5]
    assert draw(SamplingParams(**greedy, repetition_penalty=2), flat, prompt=(3,))[0] == 5
    negative = torch.full((VOCAB,), -1.0)
    negative[3] = -0.9
    assert draw(SamplingParams(**greedy, repetition_penalty=2), negative, prompt=(3,))[0] != 3


def test_frequency_penalty_grows_with_each_occurrence() -> None:
    logits = torch.full((VOCAB,), -10.0)
    logits[3], logits[5] = 1.0, 0.0
    assert draw(SamplingParams(temperature=0, frequency_penalty=0.4), logits, count=6) == [3, 3, 3, 5, 3, 5]


def test_min_tokens_holds_the_endings_back() -> None:
    logits = LOGITS.flip(0)  # token 0, an ending, is the likeliest
    assert draw(SamplingParams(temperature=0, min_tokens=2), logits, count=3) == [1, 1, 0]


def test_log_probabilities_are_the_models_own() -> None:
    sampler = Sampler(2, VOCAB)
    sampler.admit(1, SamplingParams(temperature=0, logit_bias={2: 100}, logprobs=2), 0, (), [])
    sampler.admit(2, SamplingParams(temperature=0), 0, (), [])
    ids, chosen, top_ids, top = sampler.sample(LOGITS.expand(2, -1), np.array([1, 2]), np.array([0, 0]))
    assert ids.tolist() == [2, 19]
    assert chosen is not None and chosen[0] == pytest.approx(LOGITS.log_softmax(0)[2].item())
    assert top_ids is not None and top is not None and top_ids[0].tolist() == [19, 18]


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(1, 12), min_size=1, max_size=12, unique=True),
    st.integers(0, 99),
)
def test_a_row_depends_on_nothing_beside_it(seed: int, slots: list[int], position: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(13, VOCAB)
    sampler = Sampler(12, VOCAB)
    kinds = [{"top_k": 4}, {"top_p": 0.7}, {}, {"temperature": 0}, {"min_p": 0.2}, {"presence_penalty": 1.0}]
    for slot in range(1, 13):
        sampler.admit(slot, SamplingParams(**kinds[slot % 6]), derive(seed, slot), (), [])
    at = np.array(slots)
    together = sampler.sample(logits[at], at, np.full(len(at), position))[0]
    for slot, token in zip(slots, together, strict=True):
        fresh = Sampler(12, VOCAB)
        fresh.admit(slot, SamplingParams(**kinds[slot % 6]), derive(seed, slot), (), [])
        assert fresh.sample(logits[slot : slot + 1], np.array([slot]), np.array([position]))[0][0] == token


def test_uniforms_are_uniform_and_differ_by_seed_and_position() -> None:
    positions = np.arange(50_000)
    u = uniform(np.zeros(50_000, np.uint64), positions)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
    v = uniform(np.ones(50_000, np.uint64), positions)
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.02
    assert len({derive(5, i) for i in range(100)}) == 100 and derive(5, 0) == 5


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", True), ("max_tokens", 0), ("max_tokens", 1.5), ("min_tokens", 200), ("temperature", -0.1),
        ("temperature", NAN), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
        ("top_p", NAN), ("min_p", -0.1), ("repetition_penalty", 0.0), ("presence_penalty", 2.5),
        ("frequency_penalty", NAN), ("seed", -1), ("seed", 2**64), ("logprobs", -1), ("logprobs", 1000),
        ("stop", [""]), ("stop", ["x"] * 100), ("stop", [b"x"]), ("stop_token_ids", [-3]), ("logit_bias", {1: NAN}),
        ("logit_bias", {-1: 0.0}), ("depth", "sideways"), ("depth", "fixed(0)"), ("depth", "gate(nan)"),
        ("depth", "confidence(luck, 0.5)"), ("depth", "chain()"), ("depth", 3),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
