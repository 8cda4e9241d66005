"""Weights of eight bits: near the model that they come from, and one model at every batch size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.linear import Blocked
from kernels.linear.blocks_numba import from_blocks
from models import int8
from models.errors import ConfigError
from models.int8 import to_int8
from models.load import load
from serving import LLM, SamplingParams
from tests.models.reference import publish

TINY: dict[str, Any] = {"vocab_size": 71, "num_hidden_layers": 2, "hidden_size": 48, "eos_token_id": 3}
MODELS = {
    "mamba-tied": {"model_type": "mamba", "state_size": 4, **TINY},
    "gla": {
        "model_type": "gla",
        "num_heads": 2,
        "intermediate_size": 64,
        "tie_word_embeddings": False,
        **TINY,
    },
}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(int8, "LEAST", 0)
    publish(MODELS[request.param], tmp_path)
    return tmp_path


def eight_bits(blocked: Blocked | None) -> bool:
    return blocked is not None and blocked.matrix.blocks.dtype == np.int8


def test_log_probabilities_stay_near(folder: Path) -> None:
    prompt = list(range(40))
    exact = torch.tensor(LLM(load(folder, "float32")).score([prompt])[0])
    eight = torch.tensor(LLM(load(folder, "float32", weights="int8")).score([prompt])[0])
    assert exact.std() > 0.5  # there is something to lose
    difference = (eight - exact).abs()
    assert 0 < difference.mean() < 0.03
    assert difference.max() < 0.2


def test_tokens_do_not_depend_on_the_batch(folder: Path) -> None:
    llm = LLM(load(folder, "float32", weights="int8"), slots=40)
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [[i, 2 * i] for i in range(35)]
    together = [c.token_ids for c in llm.generate(prompts, greedy)]
    for i in (0, 7, 34):
        assert llm.generate([prompts[i]], greedy)[0].token_ids == together[i]


def test_the_weight_itself_says_what_the_eight_bits_say(folder: Path) -> None:
    loaded = load(folder, "float32")
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    to_int8(loaded.model, least=0)
    held = [m for m in loaded.model.modules() if eight_bits(getattr(m, "blocked", None))]
    assert held
    for module in held:
        blocks, scale, _ = module.blocked.matrix
        stored = torch.from_numpy(from_blocks(blocks, *module.weight.shape))
        torch.testing.assert_close(module.weight, stored * torch.from_numpy(scale)[:, None])
    changed = {name for name, p in loaded.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not any("norm" in name or "conv" in name for name in changed)


def test_it_is_never_done_unasked_and_has_a_fingerprint_of_its_own(folder: Path) -> None:
    plain, eight = load(folder, "float32"), load(folder, "float32", weights="int8")
    assert not any(eight_bits(getattr(m, "blocked", None)) for m in plain.model.modules())
    assert any(eight_bits(getattr(m, "blocked", None)) for m in eight.model.modules())
    assert plain.fingerprint != eight.fingerprint
    with pytest.raises(ConfigError, match=r"weights.*int4.*auto, int8"):
        load(folder, weights="int4")
