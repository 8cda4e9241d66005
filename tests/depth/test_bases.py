"""Every family as the base of a model of adaptive depth: equal to the plain reference, whatever tokens skip."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.checkpoint import save
from models.decoder import Decoder
from models.depth.lora import DepthLora, DepthNorm, projections
from models.errors import ConfigError
from models.layers import Packed
from models.load import load
from models.registry import family as registered
from models.registry import names
from serving import LLM, SamplingParams
from serving.engine.depth import DepthPolicy
from tests import tiny
from tests.depth.plain import Plain
from tests.depth.test_depth import between
from tests.models.small import SMALL

LAYERS = 4
KINDS: dict[str, dict[str, Any]] = {
    "sorted propagate": {"model_type": "sorted", "exits": [1, 3]},
    "sorted absent": {"model_type": "sorted", "exits": [2], "skipped": "absent"},
    "looped last_exited": {"model_type": "recursive", "sharing": "middle_cycle", "num_recursions": 2,
                           "skipped": "last_exited", "lora_rank": 2, "untied": True},
    "looped propagate": {"model_type": "recursive", "sharing": "middle_sequence", "num_recursions": 2,
                         "skipped": "propagate"},
}  # fmt: skip
# One of each way to make a layer: norms behind their halves, gates beside queries, two mixers, windows, no MLP.
FAMILIES = ["mamba2", "olmo_hybrid", "qwen3_next", "recurrent_gemma", "rwkv", "samba", "xlstm"]


def base(family: str) -> dict[str, Any]:
    return {**SMALL[family], "num_hidden_layers": LAYERS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_reference(family: str, kind: str, tmp_path: Path) -> None:
    rng = random.Random(f"{family} {kind}")
    config = {**KINDS[kind], "base": base(family)}
    loaded = load(tiny.checkpoint(tmp_path, config, text=False, scale=1.0), "float32")
    scout = Plain(loaded.model, DepthPolicy.confidence("entropy", 0.0))
    scout.generate([rng.randrange(61) for _ in range(9)], 4)
    policy = DepthPolicy.confidence("entropy", between(scout.seen["entropy"]))
    prompts = [[rng.randrange(61) for _ in range(length)] for length in (2, 13, 7)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, depth=policy)
    taken = set()
    for prompt, made in zip(
        prompts, LLM(loaded, slots=3, prefill_tokens=5).generate(prompts, params), strict=True
    ):
        ids, logprobs, depths = Plain(loaded.model, policy).generate(prompt, 6)
        assert (made.token_ids, made.depths) == (ids, depths)
        assert made.logprobs == pytest.approx(logprobs, abs=1e-4)
        taken |= set(depths)
    assert len(taken) > 1, "no token left early"


@torch.no_grad()
def merged(relaxed: Decoder, plain: Decoder) -> None:
    """Give a plain model the weights that a relaxed one of a single pass works with: W + B A, norms of their depth."""

    def weight(projection: Any, lora: DepthLora) -> Tensor:
        low = lora.B[0].split(lora.sizes)
        update = [b @ a for b, a in zip(low, lora.A[0], strict=True)]
        return projection.weight + lora.scale * torch.cat(update)

    for name, parameter in plain.named_parameters():
        if not name.startswith("layers."):
            parameter.copy_(relaxed.get_parameter(name))
    for mine, theirs in zip(plain.blocks, relaxed.blocks, strict=True):
        loras = {
            path: theirs.get_submodule(f"loras.{path.replace('.', '_')}") for path, _ in projections(theirs)
        }
        for path, module in mine.named_modules():
            other: Any = theirs.get_submodule(path)
            for name, parameter in module.named_parameters(recurse=False):
                value = getattr(other, name)
                if isinstance(other, DepthNorm):
                    value = value[0]
                elif isinstance(lora := loras.get(path), DepthLora) and name == "weight":
                    value = weight(other, lora)
                elif isinstance(lora, DepthLora) and lora.bias is not None:
                    value = value + lora.bias.mul_(has_bias(other))[0]
                parameter.copy_(value)


def has_bias(projection: Any) -> Tensor:
    """Of each output: 1 where it has a bias, 0 where it has none, in a Packed of which only some parts do."""
    if not isinstance(projection, Packed):
        return torch.ones(len(projection.weight))
    parts = zip(projection.names, projection.sizes, strict=True)
    return torch.cat([torch.full((size,), float(name in projection.biased)) for name, size in parts])


@pytest.mark.parametrize("family", [name for name in SMALL if name != "rwkv7"])
def test_an_update_by_depth_counts_at_every_projection(family: str, tmp_path: Path) -> None:
    """A relaxed model of one pass is the plain one of the sums: no family reads a weight behind its update's back."""
    config = {
        "model_type": "recursive", "base": SMALL[family], "sharing": "cycle", "num_recursions": 1, "lora_rank": 2,
        "lora_alpha": 1.0, "untied": True,
    }  # fmt: skip
    relaxed = load(tiny.checkpoint(tmp_path / "a", config, text=False, scale=0.7), "float32")
    _, plain = registered(SMALL[family], "test").build(SMALL[family], "test")
    merged(relaxed.model, plain)
    save(tmp_path / "b", plain, names(SMALL[family], "test"), SMALL[family], torch.float32)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)
    prompt = list(range(7, 30))
    one, other = (
        LLM(model, slots=1).generate([prompt], params)[0]
        for model in (relaxed, load(tmp_path / "b", "float32"))
    )
    assert one.token_ids == other.token_ids
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_whose_layers_pass_on_more_than_a_hidden_vector_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"base\.model_type = 'rwkv7': must be a plain stack"):
        registered(KINDS[kind], "test").build({**KINDS[kind], "base": base("rwkv7")}, "test")
