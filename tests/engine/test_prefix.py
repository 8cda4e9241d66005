"""The prefix cache: the tree against a dictionary, the engine with it against the engine without, and states that come
back bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from models.load import load
from serving import LLM, SamplingParams
from serving.engine.core import Request
from serving.engine.depth import DepthPolicy
from serving.engine.news import Output
from serving.engine.prefix import Miss, Node, PrefixCache, edge_bytes
from tests import tiny
from tests.depth.test_depth import GLA, LLAMA, recursive
from tests.engine.fake import FakeRunner, assert_no_leak, looped, make_engine, plain, reference, signal


@dataclass
class Thing:
    """A state of known size."""

    ids: tuple[int, ...]
    nbytes: int = 10


def free(tokens: int) -> int:
    """Of a tree whose states alone count."""
    return 0


prefixes = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda ids: [7] * 17 + ids)


def below(node: Node) -> Iterator[Node]:
    for child in node.children.values():
        yield child
        yield from below(child)


class TreeAgainstDictionary(RuleBasedStateMachine):
    """Whatever is inserted and asked for, in any order, under a budget of five states."""

    budget = 50
    edge_bytes = staticmethod(free)

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(self.budget, most_ghosts=4, edge_bytes=self.edge_bytes)
        self.known: dict[tuple[str, tuple[int, ...]], Thing] = {}

    @rule(key=st.sampled_from("ab"), ids=prefixes)
    def insert(self, key: str, ids: list[int]) -> None:
        self.cache.insert(key, np.array(ids), lambda above: Thing(tuple(ids)))
        self.known[key, tuple(ids)] = Thing(tuple(ids))
        self.known = {
            (k, i): thing for (k, i), thing in self.known.items() if self.cache.holds(k, np.array(i))
        }

    @rule(key=st.sampled_from("ab"), ids=prefixes, spare=st.integers(0, 3))
    def match(self, key: str, ids: list[int], spare: int) -> None:
        most = len(ids) - spare
        found = self.cache.match(key, np.array(ids), most)
        lengths = (len(i) for k, i in self.known if k == key and tuple(ids[: len(i)]) == i and len(i) <= most)
        best = max(lengths, default=0)
        assert found.tokens == best
        if found.node is not None:
            (state,) = self.cache.chain(found.node)
            assert state.ids == tuple(ids[:best])  # type: ignore[attr-defined]
        assert (found.miss is Miss.NONE) == (best == most)
        assert found.seen >= found.tokens

    @invariant()
    def every_node_leads_to_something(self) -> None:
        nodes = [node for root in self.cache._roots.values() for node in below(root)]
        assert all(node.children or node.saved or node in self.cache._ghosts for node in nodes)
        assert set(self.cache._states) | set(self.cache._ghosts) <= set(nodes)
        assert len(self.cache._ghosts) <= 4

    @invariant()
    def within_budget(self) -> None:
        nodes = [node for root in self.cache._roots.values() for node in below(root)]
        edges = sum(self.edge_bytes(len(node.edge)) for node in nodes)
        assert self.cache.bytes == 10 * len(self.cache) + edges <= self.budget
        assert len(self.cache) == len(self.known)


class TreeWithItsEdges(TreeAgainstDictionary):
    """The same where the tokens of the tree count: three prompts at most."""

    budget = 3 * edge_bytes(29)
    edge_bytes = staticmethod(edge_bytes)


TestTree = TreeAgainstDictionary.TestCase
TestTreeWithItsEdges = TreeWithItsEdges.TestCase


def test_small_states_of_long_prompts_do_not_outgrow_the_budget_by_their_tokens() -> None:
    """A thousand prompts of 10,000 tokens, each with a state of 10 bytes: 30 megabytes of tokens, and a budget of one.
    What is really held counts."""
    cache = PrefixCache(1_000_000)
    for number in range(1000):
        ids = np.arange(10_000) + 10_000 * number
        if number % 2:  # and some that part from another one in the middle
            ids[:5000] = np.arange(5000) + 10_000 * (number - 1)
        cache.insert("k", ids, lambda above: Thing(()))
    nodes = [node for root in cache._roots.values() for node in below(root)]
    bases = {id(e): e for e in (n.edge if n.edge.base is None else n.edge.base for n in nodes)}
    assert sum(e.nbytes for e in bases.values()) <= cache.edges_bytes <= cache.bytes <= cache.budget
    assert len(cache) > 20


def test_every_miss_has_its_reason() -> None:
    cache = PrefixCache(20, edge_bytes=free)
    a = np.arange(100)

    def keep(ids: np.ndarray, key: str = "k") -> None:
        cache.insert(key, ids, lambda above: Thing(tuple(ids)))

    assert PrefixCache(0).match("k", a, 99).miss is Miss.DISABLED
    assert cache.match("k", a[:5], 4).miss is Miss.SHORT
    assert cache.match("k", a, 99).miss is Miss.UNSEEN
    keep(a[:60])
    assert cache.match("k", a[:61], 60).miss is Miss.NONE
    assert cache.match("k", np.append(a[:40], 999), 40).miss is Miss.BETWEEN
    assert cache.match("other", a, 99).miss is Miss.POLICY
    keep(a[200 - 150 : 200 - 120] + 500)
    keep(np.arange(1000, 1090))
    assert len(cache) == 2 and cache.evictions == 1
    lost = [x for x in (a[:60], a[50:80] + 500) if not cache.holds("k", x)]
    assert cache.match("k", np.append(lost[0], 5), len(lost[0])).miss is Miss.EVICTED


def test_policies_leave_nothing_behind() -> None:
    cache = PrefixCache(20, most_ghosts=4, edge_bytes=free)
    ids = np.arange(40)
    for number in range(300):
        key = f"gate({number})"
        assert cache.match(key, ids, 40).node is None and not cache.holds(key, ids)
        assert len(cache._roots) <= 7  # states, ghosts, and no trace of who only asked
        cache.insert(key, ids, lambda above: Thing(tuple(ids)))


def test_what_costs_least_to_compute_again_goes_first() -> None:
    cache = PrefixCache(30, edge_bytes=free)
    for first, length in ((1, 500), (2, 40), (3, 300), (4, 90)):
        cache.insert("k", np.array([first] * length), lambda above: Thing(()))
    assert not cache.holds("k", np.array([2] * 40))
    assert all(cache.holds("k", np.array([f] * n)) for f, n in ((1, 500), (3, 300), (4, 90)))


def test_states_that_grow_are_saved_in_parts_and_the_upper_ones_stay() -> None:
    cache = PrefixCache(30, grows=True, edge_bytes=free)
    ids = np.arange(90)
    for end in (90, 30, 60):
        cache.insert("k", ids[:end], lambda above: Thing((0 if above is None else len(above.ids), end)))  # noqa: B023
    ends = [n.end for n in cache._states]
    assert sorted(ends) == [30, 60, 90]
    node = cache.match("k", np.append(ids, 5), 90).node
    assert isinstance(node, Node) and [s.ids for s in cache.chain(node)] == [(0, 90)]  # type: ignore[attr-defined]
    node = cache.match("k", np.append(ids[:60], 999), 60).node
    assert node is not None and [s.ids for s in cache.chain(node)] == [(0, 30), (2, 60)]  # type: ignore[attr-defined]


@given(
    stems=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=60), min_size=1, max_size=3),
    picks=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 60), st.lists(st.integers(0, 5), max_size=25)),
        min_size=1,
        max_size=14,
    ),
    budget=st.sampled_from([100, 300, 2_000, 10_000, 1_000_000]),
    deep=st.booleans(),
)
def test_the_engine_gives_the_same_with_and_without(
    stems: list[list[int]], picks: list[tuple[int, int, list[int]]], budget: int, deep: bool
) -> None:
    path = looped(3) if deep else plain()
    engine = make_engine(FakeRunner(path), 3, prefill_tokens=13, prefix_cache_bytes=budget)
    policy = DepthPolicy.gate(0.4) if deep else DepthPolicy.full()
    made: dict[str, Output] = {}
    prompts = {}
    for number, (stem, cut, rest) in enumerate(picks):
        prompts[str(number)] = [*stems[stem % len(stems)][:cut], *rest] or [1]
        engine.submit(Request(str(number), prompts[str(number)], SamplingParams(max_tokens=4, depth=policy)))
        made[str(number)] = Output(str(number), 0)
        for _ in range(number % 4):
            for out in engine.step():
                made[out.request_id].extend(out)
    while engine.busy:
        for out in engine.step():
            made[out.request_id].extend(out)
    for name, prompt in prompts.items():
        ids, _ = reference(path, prompt, 4, lambda units, hidden: deep and signal(hidden) >= 0.4)
        assert made[name].ids == ids
    assert engine.memory.cache.bytes <= budget
    assert_no_leak(engine)


def test_prefill_work_of_a_conversation_grows_with_the_new_tokens_only() -> None:
    engine = make_engine(FakeRunner(plain()), 2, prefix_cache_bytes=1_000_000)
    history: list[int] = []
    for turn in range(20):
        history += [turn * 31 + i for i in range(30)]
        engine.runner.ticks.clear()  # type: ignore[attr-defined]
        engine.submit(Request(str(turn), list(history), SamplingParams(max_tokens=10)))
        answer = Output(str(turn), 0)
        while engine.busy:
            for out in engine.step():
                answer.extend(out)
        ran = sum(tokens for _, tokens in engine.runner.ticks)  # type: ignore[attr-defined]
        assert ran <= 30 + 10 + 1, f"turn {turn} ran {ran} tokens"
        assert answer.usage is not None and answer.usage.cached_tokens >= len(history) - 31
        history += answer.ids


def test_many_continuations_of_a_long_prompt_cost_one_prefill() -> None:
    engine = make_engine(FakeRunner(plain()), 8, prefill_tokens=512)
    engine.submit(Request("fork", list(range(900)) * 11, SamplingParams(n=8, max_tokens=3)))
    while engine.busy:
        engine.step()
    assert sum(tokens for _, tokens in engine.runner.ticks) <= 9900 + 8 * 3  # type: ignore[attr-defined]


CONFIGS = {
    "gla": GLA,
    "llama": LLAMA,
    "looped gla": recursive(GLA, 3, sharing="middle_cycle", num_recursions=3),
    "looped llama": recursive(LLAMA, 3, sharing="middle_cycle", num_recursions=3, skipped="last_exited"),
    "shared": recursive(LLAMA, 3, sharing="middle_cycle", num_recursions=2, skipped="shared"),
}


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5)
@given(cut=st.integers(20, 59), seed=st.integers(0, 99))
def test_restored_is_recomputed_bit_for_bit(
    name: str, cut: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(tmp_path_factory.getbasetemp()) / f"prefix {name}"
    if not folder.exists():
        tiny.checkpoint(folder, CONFIGS[name], text=False)
    model = load(folder, dtype="float32")
    torch.manual_seed(seed)
    stem = torch.randint(0, 61, (cut,)).tolist()
    prompt = [*stem, *torch.randint(0, 61, (17,)).tolist()]
    depth = "confidence(entropy, 3.5)" if "looped" in name else None
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=8, ignore_eos=True, logprobs=0, depth=depth)
    llm = LLM(model, slots=2, prefill_tokens=4096, prefix_cache_mb=50)
    llm.generate([[*stem, 0]], params)
    restored = llm.generate([prompt], params)[0]
    assert restored.usage is not None and restored.usage.cached_tokens >= cut
    # The same cuts, so that every matrix product has the same shape; nothing is restored.
    fresh = LLM(model, slots=2, prefill_tokens=4096, prefix_cache_mb=0)
    engine = fresh.engine
    engine.submit(Request("x", prompt, params, seed=5))
    made = Output("x", 0)
    sequence = None
    while engine.busy:
        if sequence is None:
            for admitted in engine.scheduler.admit():
                engine.runner.admit(admitted, ())
                admitted.marks = [restored.usage.cached_tokens, len(prompt) - 1]
                sequence = admitted
        for out in engine.step():
            made.extend(out)
    assert made.ids == restored.token_ids
    assert made.logprobs == restored.logprobs, "not bit for bit"
    assert_no_leak(llm.engine)
