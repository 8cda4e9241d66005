"""Mixture-of-Recursions over any layers: over a Llama it is the published model, over a GLA what the equations say."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.depth.mor import ExpertChoice
from models.errors import ConfigError
from models.load import load
from models.registry import family
from serving import LLM, SamplingParams
from serving.engine.depth import DepthPolicy
from tests import tiny
from tests.depth.plain import Plain
from tests.depth.test_depth import GLA
from tests.depth.test_mor import AUX_LOSS, VOCAB, make
from tests.engine.fake import assert_no_leak

RENAMED = {
    "expert": (
        (r"^model\.layers\.1\.block\.(\d)\.", lambda m: f"model.layers.{1 + int(m[1])}."),
        (r"^model\.layers\.4\.", "model.layers.3."),
        (r"^model\.layers\.(\d)\.mor_router\.router\.", lambda m: f"routers.{int(m[1]) - 1}."),
    ),
    "token": (
        (r"^model\.layers\.1\.block_list\.0\.(\d)\.", lambda m: f"model.layers.{1 + int(m[1])}."),
        (r"^model\.layers\.2\.", "model.layers.3."),
        (r"^model\.layers\.1\.mor_router\.router\.", "router.0."),
        (r"^model\.layers\.1\.router_bias", "router_bias"),
    ),
}
"""Of the published names of three recursions through two layers, between one before and one after."""

PARTS: dict[str, dict[str, Any]] = {
    "expert": AUX_LOSS,
    "token": {"router_func": "softmax", "balancing": "loss_free", "gating": "weighted"},
}
ROUTED_GLA: dict[str, Any] = {
    "model_type": "routed",
    "base": GLA,
    "num_recursions": 3,
    "mor": {"type": "expert", "expert": {**AUX_LOSS, "alpha": 2.0, "gating": "residual"}},
}


def plain_names(tensors: dict[str, Any], kind: str) -> dict[str, Any]:
    """The published tensors by the names of our format, without the copies of later recursions."""
    renamed = {}
    for name, tensor in tensors.items():
        if re.search(r"\.[23]\.block\.|block_list\.[12]\.", name):
            continue
        for pattern, to in RENAMED[kind]:
            name, hits = re.subn(pattern, to, name)
            if hits:
                break
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("kind", PARTS)
def test_over_a_llama_it_is_the_published_model(tmp_path: Path, kind: str) -> None:
    published = make(tmp_path / "published", expert=kind == "expert", untied=False, part=PARTS[kind])
    config = json.loads((published / "config.json").read_text())
    base = {**config, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4}
    routed = tmp_path / "routed"
    routed.mkdir()
    mor = {"type": kind, kind: PARTS[kind]}
    text = json.dumps({"model_type": "routed", "base": base, "num_recursions": 3, "mor": mor})
    (routed / "config.json").write_text(text)
    tensors = plain_names(load_file(str(published / "model.safetensors")), kind)
    save_file(tensors, str(routed / "model.safetensors"))
    rng = random.Random(kind)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 7, 30)]
    for depth in (None, "fixed(2)"):
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0, depth=depth)
        ours, theirs = (LLM(f, dtype="float32").generate(prompts, params) for f in (routed, published))
        for a, b in zip(ours, theirs, strict=True):
            assert (a.token_ids, a.depths) == (b.token_ids, b.depths)
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


class Routed(Plain):
    """Expert choice with a residual weight, from the equations: h' = h + 2 sigmoid(r(h)) (f(h) - h), and on with the
    next recursion where its router says so."""

    def looped(self, token: int, position: int) -> tuple[torch.Tensor, int]:
        model = self.model
        assert isinstance(model, ExpertChoice)
        x = model.embeddings(torch.tensor([token]))
        x = self.layer(0, 0, x, position)
        for recursion in range(3):
            logit = x @ model.routers.last[recursion, 0]
            if recursion and logit < 0:
                return self.predict(x, position), recursion
            h = self.layer(2, recursion, self.layer(1, recursion, x, position), position)
            x = x + 2 * logit.sigmoid() * (h - x)
        return self.predict(x, position), 3


def test_over_a_gla_equals_the_equations(tmp_path: Path) -> None:
    loaded = load(tiny.checkpoint(tmp_path, ROUTED_GLA, text=False), dtype="float32")
    rng = random.Random(1)
    prompts = [[rng.randrange(61) for _ in range(n)] for n in (1, 7, 40, 3)]
    llm = LLM(loaded, slots=3, prefill_tokens=11)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=0)
    depths: set[int] = set()
    for prompt, made in zip(prompts, llm.generate(prompts, params), strict=True):
        ids, logprobs, expected = Routed(loaded.model, DepthPolicy("router")).generate(prompt, 9)
        assert (made.token_ids, made.depths) == (ids, expected)
        torch.testing.assert_close(made.logprobs, logprobs, rtol=0, atol=1e-4)
        depths |= set(expected)
    assert len(depths) > 1
    assert_no_leak(llm.engine)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"base": {**GLA, "num_hidden_layers": 2}}, "base.num_hidden_layers"),
        ({"skipped": "shared"}, "skipped"),
        ({"skipped": "propagate"}, "skipped"),
        ({"sharing": "sequence"}, "sharing"),
        ({"num_recursions": 0}, "num_recursions"),
        ({"mor": {"type": "expert"}}, "mor"),
        ({"mor": {**ROUTED_GLA["mor"], "capacity": "1,0.5"}}, "mor.capacity"),
        (
            {"mor": {**ROUTED_GLA["mor"], "capacity": "0.9,0.5,0.1"}, "skipped": "last_exited"},
            "must begin with 1 where skipped recursions are last_exited",
        ),
    ],
)
def test_impossible_configurations_are_refused(changed: dict[str, Any], field: str) -> None:
    raw = {**ROUTED_GLA, **changed}
    with pytest.raises(ConfigError, match=re.escape(field)):
        family(raw, "test").build(raw, "test")
