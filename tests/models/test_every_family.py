"""What holds for all families alike."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.batch import Batch
from models.load import load
from models.registry import FAMILIES, family
from serving import LLM, SamplingParams
from tests.models.reference import publish, randomise
from tests.models.small import SMALL

PROMPT = torch.randint(61, (40,), generator=torch.Generator().manual_seed(3)).tolist()
MIXERS = {name for name, module in FAMILIES.items() if module.startswith("models.mixers.")}


def test_every_family_has_a_small_configuration() -> None:
    assert set(SMALL) == MIXERS - {"llama"}  # whose tests are those of depth


@pytest.mark.parametrize("name", SMALL)
def test_lower_precision_is_close(name: str, tmp_path: Path) -> None:
    """bfloat16 takes the same way: no operation refuses it, and what comes out is near."""
    publish(SMALL[name], tmp_path)
    scores = {}
    for dtype in ("float32", "bfloat16"):
        llm = LLM(tmp_path, dtype=dtype, slots=2, prefill_tokens=16)
        made = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))[0].token_ids
        assert len(made) == 3
        scores[dtype] = torch.tensor(llm.score(PROMPT)[0])
    apart = (scores["float32"] - scores["bfloat16"]).abs()
    assert apart.mean() < 0.15 * scores["float32"].std(), f"{apart.mean():.3f} apart on average"


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_has_a_gradient(name: str) -> None:
    """Of a loss behind a whole pass; so a model can be trained, and no weight is there in vain."""
    torch.manual_seed(0)
    model = family(SMALL[name], "test").build(SMALL[name], "test")[1]
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    randomise(model)
    ids = torch.tensor(PROMPT)
    logits = model(ids, Batch.of_sequences([25, 15]))
    torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", SMALL)
def test_state_is_what_the_layout_says(name: str, tmp_path: Path) -> None:
    """A fresh slot that takes over another's state goes on as that one would; its neighbours are not
    touched."""
    publish(SMALL[name], tmp_path)
    loaded = load(tmp_path, "float32")
    llm = LLM(loaded, slots=3)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    alone = [llm.generate(PROMPT[:n], params)[0].token_ids for n in (7, 23)]
    together = llm.generate([PROMPT[:7], PROMPT[:23], PROMPT[:7]], params)
    assert [c.token_ids for c in together] == [alone[0], alone[1], alone[0]]
    forked = llm.generate(PROMPT[:23], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, n=2))[0]
    assert [c.token_ids for c in forked.outputs] == [alone[1], alone[1]]
    assert loaded.model.flops() > 2 * sum(p.numel() for p in loaded.model.layers.parameters())


WHOLE_VECTORS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size",), 256),
    **dict.fromkeys(
        ("intermediate_size", "decay_low_rank_dim", "gate_low_rank_dim", "proj_low_rank_dim"), 64
    ),
    **dict.fromkeys(("a_low_rank_dim", "v_low_rank_dim"), 64),
    **dict.fromkeys(
        ("head_dim", "linear_key_head_dim", "linear_value_head_dim", "state_size", "num_slots"), 16
    ),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads", "expand_ratio", "z_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 16),
}
"""Widths of whole vectors, as models have: torch computes the last few numbers of an array in another way."""


@pytest.mark.parametrize("name", SMALL)
def test_numbers_are_the_same_to_the_bit_in_any_batch(name: str, tmp_path: Path) -> None:
    raw = {key: WHOLE_VECTORS.get(key, value) for key, value in SMALL[name].items()}
    raw |= {"num_heads": 32} if name == "mamba2" else {}
    raw |= {"attn": {**raw["attn"], "num_heads": 16}} if name == "samba" else {}
    publish(raw, tmp_path)
    llm = LLM(load(tmp_path, "float32"), slots=20, prefill_tokens=11)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)
    prompts = [PROMPT[i : i + 1 + 2 * i] for i in range(19)]
    together = llm.generate(prompts, params)
    for i in (0, 1, 9, 18):
        alone = llm.generate(prompts[i], params)[0]
        assert alone.token_ids == together[i].token_ids
        assert alone.logprobs == together[i].logprobs
