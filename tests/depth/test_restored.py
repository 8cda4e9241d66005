"""What later turns go on from is what would be computed again, whatever depths the tokens before took."""

from typing import Any

import pytest
import torch

from serving import LLM, SamplingParams
from serving.engine.depth import DepthPolicy
from tests.depth.plain import Plain
from tests.depth.test_depth import between, loaded

NAMES = [
    "nested absent", "nested propagate", "sorted gla absent", "sequence", "middle_cycle shared",
    "relaxed last_exited", "looped gla propagate", "huginn",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_turns_go_on_from_kept_states(name: str) -> None:
    """Three turns, each kept as what it adds to the one before; the last one also under another policy."""
    model = loaded(name)
    scout = Plain(model.model, DepthPolicy.confidence("entropy", 0.0))
    scout.generate([5, 6, 7], 6)
    policy = DepthPolicy.confidence("entropy", between(scout.seen["entropy"]))
    options: dict[str, Any] = {
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "seed": 5,
        "max_tokens": 17,
    }
    warm = LLM(model, slots=2, prefill_tokens=64, prefix_cache_mb=50)
    cold = LLM(model, slots=2, prefill_tokens=64, prefix_cache_mb=0)
    ids = torch.randint(0, 61, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    taken = set()
    for chosen in (policy, policy, policy, DepthPolicy.full()):
        params = SamplingParams(**options, depth=chosen)
        restored, computed = (llm.generate([ids], params)[0] for llm in (warm, cold))
        assert (restored.token_ids, restored.depths) == (computed.token_ids, computed.depths)
        assert restored.logprobs == pytest.approx(computed.logprobs, abs=1e-4)
        assert restored.usage is not None
        assert restored.usage.cached_tokens == (0 if chosen != policy or not taken else len(ids) - 4)
        taken |= set(restored.depths)
        ids = [*ids, *restored.token_ids, 5, 9, 2]
    assert len(taken) > 1, "no token left early"
