"""Weights in blocks are a second copy: where there is no room for one, the model says the same."""

from pathlib import Path

import pytest
import torch

from models import load as loading
from models.layers import Projection
from serving import LLM, SamplingParams
from serving.engine.depth import DepthPolicy
from tests.models.reference import publish
from tests.models.small import SMALL


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "gla"])
def test_without_room_for_blocks_it_says_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(SMALL[name], tmp_path)
    prompts, params = [[5], list(range(40))], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    said, blocked = [], []
    for share in (loading.BLOCKS_SHARE, 0):
        monkeypatch.setattr(loading, "BLOCKS_SHARE", share)
        llm = LLM(tmp_path, dtype="float32")
        modules = [m for m in llm.loaded.model.modules() if isinstance(m, Projection)]
        blocked.append({m.blocked is not None for m in modules})
        said.append([c.token_ids for c in llm.generate(prompts, params)])
    assert blocked == [{True}, {False}]
    assert said[0] == said[1]


def test_how_sure_a_head_is_does_not_depend_on_the_batch() -> None:
    llm = LLM("zoo/sorted", dtype="float32")
    model = llm.loaded.model
    x = torch.randn(40, model.hidden_size)
    with torch.inference_mode():
        together, alone = model.confidence(x), torch.cat([model.confidence(row[None]) for row in x])
    assert torch.equal(together, alone)


def test_confidence_leaves_a_model_of_eight_bits_too() -> None:
    llm = LLM("zoo/sorted", weights="int8")
    policy = DepthPolicy.confidence("probability", 0.2)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, depth=policy)
    assert min(llm.generate("def read(", params)[0].depths) < 6
