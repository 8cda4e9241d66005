"""What lower precision must not change: adaptive depth rounds no more than the plain model does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.load import load
from serving import LLM, SamplingParams
from tests import tiny
from tests.depth.test_depth import OURO

MAMBA: dict[str, Any] = {
    "model_type": "mamba", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "state_size": 3,
    "layer_norm_epsilon": 1e-5, "residual_in_fp32": True,
}  # fmt: skip
IDS = torch.randint(0, 61, (23,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "sorted", "base": MAMBA, "exits": [1, 2, 3]},
        {"model_type": "recursive", "base": MAMBA, "sharing": "middle_cycle", "num_recursions": 1},
        {"model_type": "recursive", "base": MAMBA, "sharing": "sequence", "num_recursions": 1},
    ],
    ids=["sorted", "looped", "sequence"],
)
def test_residuals_in_float32_stay_so_between_stages(tmp_path: Path, config: dict[str, Any]) -> None:
    """In bfloat16, all stages of a model one after the other give what its base gives in one, to the bit."""
    plain = LLM(load(tiny.checkpoint(tmp_path / "a", MAMBA, text=False), "bfloat16"), slots=1)
    staged = LLM(load(tiny.checkpoint(tmp_path / "b", config, text=False), "bfloat16"), slots=1)
    assert plain.score([IDS]) == staged.score([IDS])
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=0)
    a, b = (llm.generate([IDS], params)[0] for llm in (plain, staged))
    assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)


@pytest.mark.parametrize(("threshold", "depth"), [(0.85, 1), (0.98, 2), (0.9985, 3), (0.9995, 4), (1.0, 4)])
def test_a_gate_near_1_is_not_rounded_to_it(tmp_path: Path, threshold: float, depth: int) -> None:
    """Of a gate that says 0.9 after every loop: 0.9, 0.99, 0.999 ... of the tokens have left, in bfloat16 too."""
    loaded = load(tiny.checkpoint(tmp_path, OURO, text=False), "bfloat16")
    gate: Any = loaded.model.early_exit_gate
    gate.weight.zero_()
    gate.bias.fill_(torch.tensor(0.9).logit())
    params = SamplingParams(max_tokens=3, ignore_eos=True, depth=f"gate({threshold})")
    assert LLM(loaded, slots=1).generate([IDS], params)[0].depths == [depth] * 3
