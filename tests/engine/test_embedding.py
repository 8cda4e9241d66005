"""Embeddings: the mean or the last normed hidden vector of a prompt, however it is cut and batched."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.batch import Batch
from models.load import LoadedModel, load
from serving.engine.build import make_engine
from serving.engine.core import Request
from serving.engine.params import SamplingParams
from tests import tiny
from tests.engine.fake import assert_no_leak


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny"), "float32", "cpu")


def run(loaded: LoadedModel, requests: list[Request], prefill_tokens: int = 64) -> dict[str, list[float]]:
    engine = make_engine(loaded, 4, prefill_tokens=prefill_tokens, max_waiting=64)
    for request in requests:
        engine.submit(request)
    found: dict[str, list[float]] = {}
    while engine.busy:
        for out in engine.step():
            if out.embedding:
                assert out.request_id not in found, "an embedding comes once"
                assert out.usage is not None and out.usage.completion_tokens == 0
                found[out.request_id] = out.embedding
    assert_no_leak(engine)
    return found


@torch.no_grad()
def reference(loaded: LoadedModel, prompt: list[int]) -> np.ndarray:
    """Normed hidden vectors [T, D] of a prompt, all tokens at once."""
    model, ids = loaded.model, torch.tensor(prompt)
    batch = Batch.of_sequences([len(prompt)])
    return model.norm(model.run(0, model.embed(ids), batch, None)).numpy()


prompts = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=40), min_size=1, max_size=6)


@given(prompts=prompts, prefill_tokens=st.integers(1, 50))
def test_the_same_for_any_chunks_and_any_batch(
    loaded: LoadedModel, prompts: list[list[int]], prefill_tokens: int
) -> None:
    requests = [
        Request(f"{kind}{i}", p, embed=kind) for i, p in enumerate(prompts) for kind in ("mean", "last")
    ]
    beside = Request("beside", [1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
    found = run(loaded, [*requests, beside], prefill_tokens)
    assert found.keys() == {r.id for r in requests}
    for i, prompt in enumerate(prompts):
        hidden = reference(loaded, prompt)
        np.testing.assert_allclose(found[f"mean{i}"], hidden.mean(0), atol=2e-5)
        np.testing.assert_allclose(found[f"last{i}"], hidden[-1], atol=2e-5)


def test_of_a_prompt_as_long_as_the_model_takes(loaded: LoadedModel) -> None:
    """Nothing is generated, so no token is kept free for it."""
    engine = make_engine(loaded, 1, prefill_tokens=8, max_waiting=1, max_tokens=16)
    engine.submit(Request("a", [5] * 16, embed="mean"))
    outputs = []
    while engine.busy:
        outputs += engine.step()
    assert len(outputs) == 1 and len(outputs[0].embedding) == loaded.model.hidden_size


def test_of_tokens_that_leave_early(tmp_path: Path) -> None:
    """A shallower policy gives another vector: that of the hidden states where the tokens left."""
    looped = load(tiny.checkpoint(tmp_path / "looped", tiny.LOOPED), "float32", "cpu")
    prompt = [3, 4, 5, 6]
    found = run(
        looped, [Request(p, prompt, SamplingParams(depth=p), embed="mean") for p in ("fixed(1)", "full")]
    )
    assert np.abs(np.array(found["fixed(1)"]) - np.array(found["full"])).max() > 1e-3
