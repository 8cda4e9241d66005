"""What holds for all families alike."""

from pathlib import Path

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
