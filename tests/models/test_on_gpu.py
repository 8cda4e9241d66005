"""On a CUDA device everything is as on the CPU: every family, every kind of depth, prompts in pieces and at once."""

import copy
from pathlib import Path

import pytest
import torch

from models.load import load
from serving import LLM, SamplingParams
from tests import tiny
from tests.depth.test_depth import MODELS
from tests.models.reference import publish
from tests.models.small import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEW = 12
APART = 3e-4  # each may be 1e-4 from what is exact; loops of random weights make more of it
LENGTHS = (1, 7, 40, 150, 2)
POLICIES = {
    "huginn": "converged(latent_diff, 0.03)",
    "looped gla": "gate(0.5)",
    "nested absent": "confidence(probability, 0.2)",
    "nested propagate": "confidence(probability, 0.2)",
    "ouro": "gate(0.5)",
    "ouro absent": "gate(0.5)",
    "relaxed": "gate(0.5)",
    "sorted gla": "confidence(margin, 0.1)",
    "sorted gla absent": "confidence(margin, 0.1)",
}


def agree(folder: Path, depth: str | None, vocabulary: int, **options: int) -> list[int]:
    """Greedy tokens and depths equal, log-probabilities within APART; returns the depths. A token may differ where the
    two likeliest ones are as near: what follows it is not compared."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, depth=depth, seed=5)
    made = [
        LLM(load(folder, dtype="float32", device=device), slots=15, **options).generate(prompts, params)
        for device in ("cuda", "cpu")
    ]
    depths: list[int] = []
    for length, on_gpu, on_cpu in zip(LENGTHS, *made, strict=True):
        for i, (a, b) in enumerate(zip(on_gpu.logprobs, on_cpu.logprobs, strict=True)):
            assert abs(a - b) < APART, f"token {i} after {length}"
            if on_gpu.token_ids[i] != on_cpu.token_ids[i]:
                break
        else:
            assert on_gpu.depths == on_cpu.depths
        depths += on_cpu.depths
    return depths


@pytest.mark.parametrize("name", SMALL)
def test_every_family(name: str, tmp_path: Path) -> None:
    raw = copy.deepcopy(SMALL[name])
    publish(raw, tmp_path)
    agree(tmp_path, None, 61)
    agree(tmp_path, None, 61, prefill_tokens=11)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_depth(name: str, tmp_path: Path) -> None:
    scale = 0.7 if "huginn" in name else 1.0 if "relaxed" in name else 1.5
    tiny.checkpoint(tmp_path, MODELS[name], text=False, scale=scale)
    agree(tmp_path, None, 61)
    if name in POLICIES:
        agree(tmp_path, POLICIES[name], 61, prefill_tokens=16)
