"""The offline interface, on real tensors: batch invariance, chunking, sampling, text."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.outer import outer_naive
from models.load import LoadedModel, load
from models.mixers.gla import GLA
from models.state import StatePool
from serving import LLM, SamplingParams
from serving.engine.core import Request
from serving.errors import FailedPreconditionError, InvalidArgumentError
from tests import tiny
from tests.engine.fake import assert_no_leak


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny.checkpoint(tmp_path_factory.mktemp("gla")), dtype="float32")


def alone(loaded: LoadedModel, prompt: list[int], params: SamplingParams) -> list[int]:
    return LLM(loaded, slots=1, prefill_tokens=4096).generate(prompt, params)[0].token_ids


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ids = st.integers(0, 299)


@settings(max_examples=15)
@given(
    prompts=st.lists(st.lists(ids, min_size=1, max_size=90), min_size=1, max_size=64),
    slots=st.integers(1, 64),
    prefill_tokens=st.integers(1, 200),
)
def test_greedy_tokens_do_not_depend_on_batch_or_chunking(
    loaded: LoadedModel, prompts: list[list[int]], slots: int, prefill_tokens: int
) -> None:
    llm = LLM(loaded, slots=slots, prefill_tokens=prefill_tokens)
    together = [c.token_ids for c in llm.generate(prompts, GREEDY)]
    assert together == [alone(loaded, p, GREEDY) for p in prompts]
    assert_no_leak(llm.engine)


@settings(max_examples=10)
@given(
    jobs=st.lists(
        st.tuples(
            st.lists(ids, min_size=1, max_size=40), st.integers(1, 20), st.integers(0, 15), st.booleans()
        ),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 2**32),
)
def test_tokens_do_not_depend_on_others_that_join_and_leave(
    loaded: LoadedModel, jobs: list[tuple[list[int], int, int, bool]], seed: int
) -> None:
    """Also with sampling: randomness comes from (seed, position) alone."""
    engine = LLM(loaded, slots=5, prefill_tokens=16).engine
    made: dict[str, list[int]] = {str(i): [] for i in range(len(jobs))}
    params = [
        SamplingParams(temperature=i % 3 / 2, top_k=7 * (i % 2), max_tokens=n, seed=seed, ignore_eos=True)
        for i, (_, n, _, _) in enumerate(jobs)
    ]
    for step in range(200):
        for i, (prompt, _, when, leaves) in enumerate(jobs):
            if step == when:
                engine.submit(Request(str(i), prompt, params[i], seed=seed))
            if step == when + 8 and leaves:
                engine.cancel(str(i))
        for out in engine.step():
            made[out.request_id] += out.ids
    assert_no_leak(engine)
    for i, (prompt, n, _, leaves) in enumerate(jobs):
        expected = alone(loaded, prompt, params[i])
        assert made[str(i)] == (expected[: len(made[str(i)])] if leaves else expected)
        assert leaves or len(made[str(i)]) == n


def naive_logits(loaded: LoadedModel, tokens: list[int]) -> Tensor:
    """The model with the naive recurrence in place of the kernel, written out."""
    model = loaded.model
    x = model.embeddings.weight[tokens]
    for layer in model.layers:
        mixer: GLA = layer.mixer
        h = layer.mixer_norm(x)
        q, k, v, low, *gate = mixer.in_proj(h)
        gk = torch.nn.functional.logsigmoid(mixer.gk_proj["1"](low)) / 16
        shape = (len(tokens), mixer.kv_heads, -1)
        state = torch.zeros(mixer.kv_heads, mixer.K, mixer.V)
        o, _ = outer_naive(
            q.view(len(tokens), mixer.heads, -1),
            k.view(shape),
            v.view(shape),
            gk.view(shape),
            state,
            mixer.K**-0.5,
        )
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * mixer.g_norm.weight
        x = x + mixer.o_proj(o.flatten(1) * torch.nn.functional.silu(gate[0]))
        x = x + layer.mlp(layer.mlp_norm(x))
    return model.logits(x)


@settings(max_examples=10)
@given(
    heads=st.integers(1, 5),
    head_dims=st.tuples(st.integers(2, 7), st.integers(2, 7)),  # the norm of one number is its sign, nearly
    layers=st.integers(1, 3),
    tied=st.booleans(),
    length=st.sampled_from([1, 7, 80]),
    seed=st.integers(0, 9),
)
def test_logits_equal_those_of_the_naive_recurrence(
    tmp_path_factory: pytest.TempPathFactory,
    heads: int,
    head_dims: tuple[int, int],
    layers: int,
    tied: bool,
    length: int,
    seed: int,
) -> None:
    hidden = 4 * heads
    config = {
        **tiny.GLA, "hidden_size": hidden, "num_heads": heads, "num_hidden_layers": layers, "vocab_size": 261,
        "expand_k": heads * head_dims[0] / hidden, "expand_v": heads * head_dims[1] / hidden,
        "intermediate_size": 11, "tie_word_embeddings": tied,
    }  # fmt: skip
    folder = tiny.checkpoint(tmp_path_factory.mktemp("odd"), config, seed=seed, text=False)
    loaded = load(folder, dtype="float32")
    torch.manual_seed(seed)
    tokens = torch.randint(0, 261, (length,)).tolist()
    expected = naive_logits(loaded, tokens).log_softmax(-1)
    scores = LLM(loaded, slots=1, prefill_tokens=33).score(tokens)[0]
    for i, score in enumerate(scores):
        assert math.isclose(score, expected[i, tokens[i + 1]].item(), abs_tol=1e-4)


def test_score_and_generate_agree(loaded: LoadedModel) -> None:
    llm = LLM(loaded, slots=2)
    made = llm.generate(
        [[5, 6, 7]], SamplingParams(temperature=0, max_tokens=10, logprobs=3, ignore_eos=True)
    )[0]
    scores = llm.score([[5, 6, 7, *made.token_ids]])[0]
    assert made.logprobs == pytest.approx(scores[2:], abs=1e-5)
    for token, logprob, best in zip(
        made.token_ids, made.logprobs or [], made.top_logprobs or [], strict=True
    ):
        assert len(best) == 3 and best[token] == pytest.approx(logprob) == max(best.values())


def test_n_continuations_share_one_prefill_and_each_has_its_own_seed(loaded: LoadedModel) -> None:
    llm = LLM(loaded, slots=8)
    params = SamplingParams(n=4, seed=11, max_tokens=8, ignore_eos=True)
    first = llm.generate([[1, 2, 3]], params)[0]
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 4
    again = llm.generate([[9], [1, 2, 3]], params)[1]
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in first.outputs]
    single = llm.generate([[1, 2, 3]], SamplingParams(seed=11, max_tokens=8, ignore_eos=True))[0]
    assert single.token_ids == first.token_ids


def test_text_stops_before_the_stop_string_and_tokens_with_it(loaded: LoadedModel) -> None:
    llm = LLM(loaded, slots=2)
    params = SamplingParams(seed=3, max_tokens=60, ignore_eos=True)
    whole = llm.generate("def f", params)[0]
    stop = whole.text[20:23]
    cut = llm.generate("def f", SamplingParams(seed=3, max_tokens=60, ignore_eos=True, stop=[stop]))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.depths) == len(cut.token_ids)
    assert_no_leak(llm.engine)


def test_many_prompts_wait_their_turn(loaded: LoadedModel) -> None:
    llm = LLM(loaded, slots=3)
    made = llm.generate([[i] for i in range(20)], GREEDY)
    assert [len(c.token_ids) for c in made] == [12] * 20


def test_bad_input_is_refused_before_anything_runs(loaded: LoadedModel) -> None:
    llm = LLM(loaded, slots=2, max_tokens=50)
    for prompts, field in (
        ([[]], "prompt"),
        ([[1], [300]], "prompt"),
        ([""], "prompt"),
        ([[1] * 50], "prompt"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^{field} = "):
            llm.generate(prompts, GREEDY)
        assert not llm.engine.busy
    with pytest.raises(InvalidArgumentError, match="slots = 0"):
        LLM(loaded, slots=0)
    with pytest.raises(InvalidArgumentError, match="params = 1"):
        llm.generate([[1], [2]], [GREEDY])


def test_without_a_tokenizer_ids_go_in_and_out(tmp_path: Path) -> None:
    llm = LLM(tiny.checkpoint(tmp_path, text=False), slots=1)
    assert llm.generate([[1, 2]], GREEDY)[0].text == ""
    with pytest.raises(FailedPreconditionError, match="give token ids"):
        llm.generate(["hello"], GREEDY)


def test_state_of_a_slot_is_one_row_of_the_arena(loaded: LoadedModel) -> None:
    pool = StatePool(loaded.model.layout(), 3)
    pool.layers[1]["S"][2, 0].fill_(7)
    saved = pool.read(2)
    pool.reset(2)
    assert not pool.layers[1]["S"][2].any()
    pool.write(3, [saved])
    assert (pool.layers[1]["S"][3] == 7).all() and not pool.layers[0]["S"][3].any()
    assert pool.arena.shape[1] * 4 == loaded.model.layout().bytes_per_slot


def test_the_numbers_are_the_same_to_the_bit_in_any_batch(loaded: LoadedModel) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=0, ignore_eos=True)
    prompts = [[i + 1, 2 * i + 1, 5] * (1 + i % 3) for i in range(40)]
    together = LLM(loaded, slots=40, prefix_cache_mb=0).generate(prompts, params)
    few = LLM(loaded, slots=3, prefix_cache_mb=0).generate(prompts, params)
    assert [c.logprobs for c in together] == [c.logprobs for c in few]
