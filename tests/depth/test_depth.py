"""Adaptive depth in the engine equals the plain reference: tokens, log-probabilities and depths, for every kind of
model, policy and rule for skipped depths, whatever arrives, leaves and shares a batch."""

import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from models.load import LoadedModel, load
from serving import LLM, SamplingParams
from serving.engine.core import Request, Tick
from serving.engine.depth import DepthPolicy, ExitReason
from serving.engine.news import Output
from serving.engine.observer import Observer
from serving.errors import InvalidArgumentError
from tests import tiny
from tests.depth.plain import Plain
from tests.engine.fake import assert_no_leak

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 512,
}  # fmt: skip
GLA: dict[str, Any] = {
    **tiny.GLA,
    "vocab_size": 61,
    "hidden_size": 18,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
}


def recursive(base: dict[str, Any], layers: int, **options: Any) -> dict[str, Any]:
    return {"model_type": "recursive", "base": {**base, "num_hidden_layers": layers}, **options}


HUGINN: dict[str, Any] = {
    "model_type": "huginn_raven", "vocab_size": 61, "padding_multiple": 1, "n_embd": 24, "n_layers": 4,
    "num_attention_heads": 3, "intermediate_size": 30, "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2,
    "n_layers_in_coda": 1, "mean_recurrence": 6, "block_size": 512,
}  # fmt: skip
OURO: dict[str, Any] = {
    **LLAMA,
    "model_type": "ouro",
    "num_hidden_layers": 2,
    "total_ut_steps": 4,
    "num_key_value_heads": 4,
}

MODELS: dict[str, dict[str, Any]] = {
    "nested absent": {**LLAMA, "exits": [1, 2, 4], "skipped": "absent"},
    "nested propagate": {**LLAMA, "exits": [1, 3, 4], "skipped": "propagate"},
    "cycle": recursive(LLAMA, 2, sharing="cycle", num_recursions=3),
    "cycle last_exited": recursive(LLAMA, 2, sharing="cycle", num_recursions=3, skipped="last_exited"),
    "middle_cycle shared": recursive(LLAMA, 4, sharing="middle_cycle", num_recursions=3, skipped="shared"),
    "middle_cycle propagate": recursive(
        LLAMA, 4, sharing="middle_cycle", num_recursions=3, skipped="propagate"
    ),
    "sequence": recursive(LLAMA, 3, sharing="sequence", num_recursions=2),
    "sequence shared": recursive(LLAMA, 3, sharing="sequence", num_recursions=2, skipped="shared"),
    "middle_sequence propagate": recursive(
        LLAMA, 5, sharing="middle_sequence", num_recursions=2, skipped="propagate"
    ),
    "relaxed": recursive(LLAMA, 4, sharing="middle_cycle", num_recursions=3, lora_rank=3, exit_gate=True),
    "relaxed last_exited": recursive(
        LLAMA, 2, sharing="cycle", num_recursions=3, lora_rank=3, skipped="last_exited"
    ),
    "looped gla": recursive(GLA, 4, sharing="middle_cycle", num_recursions=4, exit_gate=True),
    "looped gla last_exited": recursive(GLA, 2, sharing="cycle", num_recursions=3, skipped="last_exited"),
    "looped gla propagate": recursive(GLA, 3, sharing="middle_cycle", num_recursions=3, skipped="propagate"),
    "sorted gla": {"model_type": "sorted", "base": GLA, "exits": [1, 3]},
    "sorted gla absent": {"model_type": "sorted", "base": GLA, "exits": [2], "skipped": "absent"},
    "ouro": OURO,
    "ouro absent": {**OURO, "skipped": "absent", "tie_word_embeddings": True},
    "huginn": HUGINN,
    "huginn zeros propagate": {
        **HUGINN,
        "init_scale": 0.0,
        "skipped": "propagate",
        "n_layers_in_coda": 2,
        "n_layers": 5,
    },
    "llama": LLAMA,
    "gla": GLA,
}
MEASURES = [
    ("confidence", m) for m in ("probability", "margin", "entropy")
] + [("converged", m) for m in ("latent_diff", "cosine", "kl", "entropy_diff", "argmax", "minp_kl")]  # fmt: skip


@cache
def loaded(name: str) -> LoadedModel:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="depth"))
    # A Huginn of larger random weights is chaotic: a rounding error grows with every pass; with updates by depth
    # twentyfold.
    scale = 0.7 if "huginn" in name else 1.0 if "relaxed" in name else 1.5
    return load(tiny.checkpoint(folder, MODELS[name], text=False, scale=scale), dtype="float32")


def between(values: list[float]) -> float:
    """A threshold near the median, as far as can be from any value."""
    known = sorted({round(v, 7) for v in values if v == v})
    middle = known[len(known) // 4 : 3 * len(known) // 4 + 1] or known
    gaps = [(b - a, (a + b) / 2) for a, b in pairwise(middle)]
    return max(gaps)[1] if gaps else known[0] - 0.5


def check(name: str, policy: DepthPolicy, *, jobs: int = 5, count: int = 7, rng: random.Random) -> list[int]:
    """Random prompts, arrivals and cancellations; returns all depths."""
    model = loaded(name)
    prompts = [[rng.randrange(61) for _ in range(rng.choice([1, 2, 7, 13]))] for _ in range(jobs)]
    seeds = [rng.randrange(2**40) for _ in range(jobs)]
    engine = LLM(model, slots=rng.choice([2, 3, 6]) * 3, prefill_tokens=rng.choice([3, 16, 64])).engine
    made: dict[str, Output] = {str(i): Output(str(i), 0) for i in range(jobs)}
    arrival = [rng.randrange(6) for _ in range(jobs)]
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=0, depth=policy)
    cancelled, step = set(), 0
    while len(made) and (step < 8 or engine.busy):
        for i in range(jobs):
            if step == arrival[i]:
                engine.submit(Request(str(i), prompts[i], params, seed=seeds[i]))
        if step == 12 and jobs > 3:
            engine.cancel("1")
            cancelled.add(1)
        for out in engine.step():
            made[out.request_id].extend(out)
        step += 1
    assert_no_leak(engine)
    depths: list[int] = []
    for i in range(jobs):
        ids, logprobs, expected = Plain(model.model, policy, seeds[i]).generate(prompts[i], count)
        got = made[str(i)]
        length = len(got.ids) if i in cancelled else count
        assert got.ids == ids[:length], f"{name} {policy}"
        assert got.depths == expected[:length], f"{name} {policy}"
        torch.testing.assert_close(
            torch.tensor(got.logprobs), torch.tensor(logprobs[:length]), rtol=0, atol=1e-4
        )
        depths += got.depths
    return depths


def full_depth(name: str) -> int:
    return loaded(name).model.path().full_depth


ADAPTIVE = [name for name in MODELS if name not in ("llama", "gla")]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_full_and_fixed_depths(name: str) -> None:
    rng = random.Random(name)
    full = full_depth(name)
    assert set(check(name, DepthPolicy.full(), rng=rng)) == {full}
    exits = getattr(loaded(name).model, "exits", range(1, full + 1))
    fixed = list(exits)[len(exits) // 2 - 1]
    assert set(check(name, DepthPolicy.fixed(fixed), rng=rng)) == {fixed}


# Every model with some of the measures, every measure with some of the models.
PAIRS = [
    (n, k, m) for i, n in enumerate(ADAPTIVE) for j, (k, m) in enumerate(MEASURES) if (i + 2 * j) % 5 == 0
]


@pytest.mark.parametrize(("name", "kind", "measure"), PAIRS, ids=[f"{n} {m}" for n, _, m in PAIRS])
def test_exits_by_confidence_and_convergence(name: str, kind: str, measure: str) -> None:
    rng = random.Random(f"{name} {measure}")
    never = {"probability": 1.0, "margin": 1.0, "argmax": 99}.get(measure, 0.0)
    scout = Plain(loaded(name).model, DepthPolicy(kind, measure=measure, threshold=never))
    scout.generate([rng.randrange(61) for _ in range(5)], 4)
    threshold = 1 if measure == "argmax" else between(scout.seen[measure])
    check(name, DepthPolicy(kind, measure=measure, threshold=threshold), jobs=3, count=4, rng=rng)


@pytest.mark.parametrize("name", ["relaxed", "looped gla", "ouro", "ouro absent"])
@pytest.mark.parametrize("bounds", [{}, {"min_depth": 2}, {"max_depth": 2}], ids=str)
def test_exits_by_gate(name: str, bounds: dict[str, int]) -> None:
    rng = random.Random(f"{name} {bounds}")
    scout = Plain(loaded(name).model, DepthPolicy.gate(1.0))
    scout.generate([rng.randrange(61) for _ in range(9)], 6)
    depths = check(name, DepthPolicy.gate(between(scout.seen["gate"]), **bounds), rng=rng)
    assert min(depths) >= bounds.get("min_depth", 1) and max(depths) <= bounds.get("max_depth", 4)


def test_nobody_goes_deeper_than_the_most() -> None:
    """Where the most lies between two exits, tokens leave at the first of them."""
    rng = random.Random(0)
    assert set(check("nested propagate", DepthPolicy.full(max_depth=2), rng=rng)) == {1}


def test_a_gate_without_a_threshold_takes_the_model_s_own() -> None:
    default = DepthPolicy.gate(0.6)
    assert DepthPolicy.gate(min_depth=2).over(default) == DepthPolicy.gate(0.6, min_depth=2)
    assert DepthPolicy.gate(0.3).over(default) == DepthPolicy.gate(0.3)
    assert DepthPolicy(None, max_depth=2).over(DepthPolicy.fixed(3)) == DepthPolicy.fixed(2, max_depth=2)


@pytest.mark.parametrize("name", ["llama", "gla"])
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0, 2, 3], [0, 1, 1, 2, 3], [3, 0, 0, 0], [1]], ids=str)
def test_chains(name: str, layers: list[int]) -> None:
    rng = random.Random(f"{name} {layers}")
    assert set(check(name, DepthPolicy.chain(layers), jobs=3, rng=rng)) == {len(layers)}
    if layers == [0, 1, 2, 3]:
        llm = LLM(loaded(name), slots=2)
        plain = llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0]
        chain = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, depth=DepthPolicy.chain(layers))
        assert llm.generate([[5, 6]], chain)[0].token_ids == plain.token_ids


def test_policies_and_depths_share_a_batch() -> None:
    """Each request of a mixed batch is as it would be alone."""
    model = loaded("ouro")
    policies = [
        "full",
        "fixed(1)",
        "fixed(3)",
        "gate(0.6)",
        "confidence(entropy, 3.0)",
        "converged(argmax, 1)",
    ]
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, depth=p) for p in policies]
    prompts = [[i + 1, 2 * i + 1, 7] for i in range(len(policies))]
    together = LLM(model, slots=6).generate(prompts, params)
    for prompt, one, made in zip(prompts, params, together, strict=True):
        alone = LLM(model, slots=1).generate(prompt, one)[0]
        assert (alone.token_ids, alone.depths) == (made.token_ids, made.depths)


@pytest.mark.parametrize("policy", ["confidence(entropy, 3.0)", "converged(kl, 0.05)"])
def test_a_prediction_through_the_coda_beside_a_prompt_of_many_tokens(policy: str) -> None:
    """Who asks what a token would predict reads a prompt token by token; who does not, in chunks of the same tick."""
    model = loaded("huginn")
    asked, other = DepthPolicy.parse(policy), DepthPolicy.full()
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2]]
    policies = [asked, other, asked]
    params = [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, seed=7, depth=p)
        for p in policies
    ]
    made = LLM(model, slots=3, prefill_tokens=16).generate(prompts, params)
    for prompt, policy_, completion in zip(prompts, policies, made, strict=True):
        ids, logprobs, depths = Plain(model.model, policy_, 7).generate(prompt, 6)
        assert (completion.token_ids, completion.depths) == (ids, depths)
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_scores_follow_the_policy() -> None:
    """Scoring what was generated under a policy gives the log-probabilities and depths it was generated with."""
    llm = LLM(loaded("looped gla"), slots=2, prefill_tokens=5)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0, depth="gate(0.7)")
    made = llm.generate([[3, 1, 4]], params)[0]
    scores = llm.score([[3, 1, 4, *made.token_ids]], depth="gate(0.7)")[0]
    assert scores[2:] == pytest.approx(made.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "policy", "words"),
    [
        ("gla", "fixed(2)", "depth.fixed = 2.*full depth of this model is 1"),
        ("gla", "confidence", "every token of this model takes all"),
        ("gla", "gate(0.5)", "every token"),
        ("cycle", "gate(0.5)", "has no gate"),
        ("cycle", "router", "has no router"),
        ("ouro", "fixed(5)", "full depth of this model is 4"),
        ("ouro", "chain(0, 1)", "stay in their order"),
        ("llama", "chain(0, 4)", "depth.chain = 4.*0 to 3"),
        ("llama", "chain(0, -1)", "depth.chain"),
        ("nested absent", "fixed(3)", "depth.fixed = 3.*1, 2, 4"),
        ("ouro", "full(min=9)", "min_depth = 9"),
        ("ouro", "full(max=0)", "depth.max_depth = 0.*only at 1, 2, 3, 4"),
        ("ouro", "fixed(3, max=2)", "depth.fixed = 3.*max_depth = 2"),
        ("ouro", "fixed(2, min=3)", "depth.fixed = 2.*min_depth = 3"),
        (
            "nested propagate",
            "full(min=2, max=2)",
            "depth.max_depth = 2.*from 2 to this one, only at 1, 3, 4",
        ),
        ("llama", "chain(0, 1, 2, max=2)", "depth.max_depth = 2.*only at 3"),
    ],
)
def test_impossible_policies_are_refused(name: str, policy: str, words: str) -> None:
    llm = LLM(loaded(name), slots=2)
    with pytest.raises(InvalidArgumentError, match=words):
        llm.generate([[1]], SamplingParams(depth=policy))
    assert_no_leak(llm.engine)


class _Looks(Observer):
    """Of all tokens of all ticks: the depth of those whose policy was given a signal."""

    def __init__(self) -> None:
        self.units: list[int] = []

    def ticked(self, tick: Tick, seconds: float) -> None:
        for tokens in tick.wanted.values():
            assert tick.units is not None
            self.units += tick.units[tokens].tolist()


def test_nobody_looks_where_every_token_goes_the_same_way() -> None:
    """Neither before the floor, nor after the last pass; and those who got there say that they went to the end."""
    engine = LLM(loaded("looped gla"), slots=3).engine
    engine.observer = looks = _Looks()
    policy = DepthPolicy.confidence("probability", 1.0, min_depth=2)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, depth=policy)
    engine.submit(Request("0", [1, 2, 3], params))
    reasons = []
    while engine.busy:
        for out in engine.step():
            reasons += out.exit_reasons
    assert set(looks.units) == {2, 3}
    assert reasons == [ExitReason.FULL_DEPTH] * 5
