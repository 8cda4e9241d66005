"""What lower precision must not change: adaptive depth rounds no more than the plain model does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.load import load
from serving import LLM, SamplingParams
from serving.engine.depth import DepthPolicy
from tests import tiny
from tests.depth import test_mor as mor
from tests.depth.plain import Plain
from tests.depth.test_depth import MODELS, OURO, between
from tests.depth.test_routed import ROUTED_GLA

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


KINDS: dict[str, str] = {
    **dict.fromkeys(
        (
            "cycle", "cycle last_exited", "middle_cycle shared", "sequence shared", "middle_sequence propagate",
            "looped gla", "looped gla last_exited", "looped gla propagate", "nested absent", "nested propagate",
            "sorted gla",
        ),
        "confidence",
    ),
    "looped gla, by its gate": "gate",
    "llama": "chain(0, 2, 2, 3)",
    "gla": "chain(0, 2, 2, 3)",
    "routed gla": "router",
    "mor expert": "router",
    "mor token shared": "router",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_in_bfloat16_a_batch_says_what_each_of_its_sequences_says_alone(tmp_path: Path, name: str) -> None:
    """To the bit, where prompts are cut alike. (Cut otherwise attention adds up in another order: some 1e-7 in float32,
    of which rounding to bfloat16 makes a whole last bit, in two numbers of a thousand.)"""
    if name.startswith("mor "):
        folder = mor.make(tmp_path, **mor.KINDS[name.removeprefix("mor ")])
    else:
        raw = ROUTED_GLA if name == "routed gla" else MODELS[name.partition(",")[0]]
        folder = tiny.checkpoint(tmp_path, raw, text=False)
    model = load(folder, "bfloat16")
    policy = KINDS[name]
    prompts = [IDS[i : i + 1 + 3 * i] for i in range(6)]
    prompts = [[token % 53 for token in prompt] for prompt in prompts]
    if policy in ("confidence", "gate"):
        signal = "entropy" if policy == "confidence" else "gate"
        never = DepthPolicy.confidence("entropy", 0.0) if policy == "confidence" else DepthPolicy.gate(1.0)
        scout = Plain(model.model, never)
        scout.generate(prompts[3], 4)
        middle = between(scout.seen[signal])
        policy = f"confidence(entropy, {middle})" if signal == "entropy" else f"gate({middle})"
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, depth=policy)
    together = LLM(model, slots=12, prefill_tokens=1).generate(prompts, params)
    by_one = LLM(model, slots=2, prefill_tokens=1)
    for prompt, made in zip(prompts, together, strict=True):
        alone = by_one.generate(prompt, params)[0]
        assert (alone.token_ids, alone.depths) == (made.token_ids, made.depths)
        assert alone.logprobs == made.logprobs
    depths = {depth for made in together for depth in made.depths}
    assert len(depths) > 1 or policy.startswith("chain") or "mor" in name, "no token left early"
