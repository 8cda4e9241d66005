"""What usage says of depth, against counts of the layers that were run."""

from collections.abc import Callable

import pytest

from models.decoder import Block
from models.depth.looped import LoopedDecoder
from serving import LLM, SamplingParams
from serving.engine.core import Request
from serving.engine.depth import DepthPolicy
from serving.engine.news import Usage
from tests.depth.plain import Plain
from tests.depth.test_depth import between, loaded


@pytest.mark.parametrize(
    ("name", "policy", "depth"),
    [
        ("nested absent", "fixed(2)", 2),
        ("sorted gla absent", "fixed(2)", 2),
        ("cycle", "fixed(1)", 1),
        ("cycle", "fixed(2)", 2),
        ("sequence", "fixed(1)", 1),
        ("sequence", "fixed(2)", 2),
        ("middle_sequence propagate", "fixed(2)", 2),
        ("looped gla propagate", "fixed(2)", 2),
        ("looped gla", "fixed(3)", 3),
        ("ouro absent", "fixed(2)", 2),
        ("huginn", "fixed(4)", 4),
        ("llama", "chain(0, 3)", 2),
        ("gla", "chain(0, 1, 2, 3)", 4),
    ],
)
def test_operations_saved_are_those_of_layers_not_run(name: str, policy: str, depth: int) -> None:
    """Of layers that all cost the same. Nothing is written at depths that no token of the request comes to."""
    model = loaded(name).model
    llm = LLM(loaded(name), slots=1)

    def passes(policy: str) -> tuple[int, Usage]:
        """Layers that one token comes through."""
        rows = []
        hooks = [layer.register_forward_hook(lambda *a: rows.append(len(a[-1]))) for layer in model.layers]
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, depth=policy)
        usage = llm.generate([[5]], params)[0].usage
        for hook in hooks:
            hook.remove()
        assert usage is not None
        return sum(rows), usage

    (full, _), (run, usage) = passes("full"), passes(policy)
    layer = (model.flops() - 2 * model.vocab_size * model.hidden_size) / full
    assert usage.mean_depth == depth
    assert usage.flops_saved == pytest.approx((full - run) * layer / model.flops(), abs=0.01)


# Operations of one layer that a token which skips it still takes: keys and values, or all of a GLA's mixer.
WRITES: dict[str, Callable[[Block], int]] = {
    "nested propagate": lambda block: 2 * 20 * 2 * 2 * 6,
    "nested absent": lambda block: 0,
    "cycle last_exited": lambda block: 2 * 20 * 2 * 2 * 6,
    "middle_cycle shared": lambda block: 0,
    "looped gla propagate": lambda block: (
        2 * sum(p.numel() for p in block.mixer.parameters()) + block.flops()
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_at_skipped_depths_is_not_saved(name: str) -> None:
    model = loaded(name).model
    scout = Plain(model, DepthPolicy.confidence("entropy", 0.0))
    scout.generate([5, 6, 7], 6)
    policy = DepthPolicy.confidence("entropy", between(scout.seen["entropy"]))
    llm = LLM(loaded(name), slots=1)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, depth=policy)
    made = llm.generate([[5, 6, 7]], params)[0]
    assert min(made.depths) < model.path().full_depth and made.usage is not None
    first = next(i for i, node in enumerate(model.path().nodes) if node.units)
    layers = model.stages[model.path().nodes[first].stage].layers
    block, per_depth = model.blocks[layers[0]], len(layers) if isinstance(model, LoopedDecoder) else 1
    cost = 2 * sum(p.numel() for p in block.parameters()) + block.flops()
    skipped = sum(model.path().full_depth - depth for depth in made.depths) * per_depth
    expected = skipped * (cost - WRITES[name](block)) / (model.flops() * len(made.depths))
    assert made.usage.flops_saved == pytest.approx(expected, abs=1e-6)


def test_tokens_of_a_prompt_pass_along_at_the_full_cost() -> None:
    """Where they write what they skip: so reading a prompt saves what lies behind the deepest that any may come."""
    name = "nested propagate"
    for policy, saves in (("confidence(entropy, 9)", False), ("confidence(entropy, 9, max=3)", True)):
        llm = LLM(loaded(name), slots=1)
        llm.engine.submit(Request("0", [5, 6, 7, 8], SamplingParams(depth=policy), score=True))
        usage = None
        while llm.engine.busy:
            for out in llm.engine.step():
                usage = out.usage or usage
        assert usage is not None and usage.mean_depth == 1
        assert (usage.flops_saved > 0) == saves
