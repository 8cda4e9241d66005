"""What usage says of depth, against counts of the layers that were run."""

import pytest

from serving import LLM, SamplingParams
from serving.engine.news import Usage
from tests.depth.test_depth import loaded


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
