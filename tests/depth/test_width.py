"""Sub-models by width: the first heads and hidden units, equal to a checkpoint that holds these alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.batch import Batch
from models.checkpoint import save
from models.errors import ConfigError
from models.load import load
from models.registry import family, names
from models.train.loop import initialise
from models.train.objectives import every_exit
from serving import LLM, SamplingParams
from serving.engine.depth import DepthPolicy
from serving.errors import InvalidArgumentError
from tests import tiny
from tests.engine.fake import assert_no_leak

HEAD, HEADS, KV, INNER = 6, 8, 4, 24
NESTED: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 20, "intermediate_size": INNER, "num_hidden_layers": 3,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD, "max_position_embeddings": 512,
    "attention_bias": True, "exits": [2, 3], "widths": [0.25, 0.5],
}  # fmt: skip


def sliced(folder: Path, width: float, layers: int) -> Path:
    """The sub-model as a checkpoint of its own."""
    heads, kv, inner = (round(width * n) for n in (HEADS, KV, INNER))
    rows = {
        "q_proj": heads * HEAD,
        "k_proj": kv * HEAD,
        "v_proj": kv * HEAD,
        "gate_proj": inner,
        "up_proj": inner,
    }
    columns = {"o_proj": heads * HEAD, "down_proj": inner}

    def cut(name: str, tensor: Tensor) -> Tensor:
        module, kind = name.split(".")[-2:]
        if module in rows:
            return tensor[: rows[module]]
        return tensor[:, : columns[module]] if module in columns and kind == "weight" else tensor

    tensors = load_file(str(folder / "model.safetensors"))
    target = folder / f"{width:g} {layers}"
    target.mkdir()
    kept = {
        k: cut(k, v).clone() for k, v in tensors.items() if not any(f".{n}." in k for n in range(layers, 3))
    }
    save_file(kept, str(target / "model.safetensors"))
    config = {**NESTED, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv}
    config |= {"intermediate_size": inner, "exits": [], "widths": []}
    save_config(target, config)
    return target


def save_config(folder: Path, config: dict[str, Any]) -> None:
    import json

    (folder / "config.json").write_text(json.dumps(config))


def test_sub_models_of_every_width_and_depth_share_a_batch(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path, NESTED, text=False)
    llm = LLM(load(folder, dtype="float32"), slots=6, prefix_cache_mb=0)
    chosen = [(w, n) for w in (0.25, 0.5, 1.0) for n in (2, 3)]
    prompts = [[i + 1, 7, 2 * i + 3, 11][: 2 + i % 3] for i in range(len(chosen))]
    params = [
        SamplingParams(
            temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, depth=f"fixed({n}, width={w})"
        )
        for w, n in chosen
    ]
    together = llm.generate(prompts, params)
    for (width, layers), prompt, one, made in zip(chosen, prompts, params, together, strict=True):
        own = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
        expected = LLM(load(sliced(tmp_path, width, layers), dtype="float32"), slots=1).generate(prompt, own)[
            0
        ]
        alone = llm.generate(prompt, one)[0]
        assert made.token_ids == expected.token_ids and made.depths == [layers] * 8
        assert made.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert made.logprobs == alone.logprobs  # to the bit, with other widths in the batch and without
    saved = [made.usage.flops_saved for made in together if made.usage]
    assert saved == sorted(saved, reverse=True) or saved[0] > saved[2] > saved[4]
    assert_no_leak(llm.engine)


def test_exits_and_skipped_layers_at_a_width(tmp_path: Path) -> None:
    """A narrow request is the same whoever shares its batch, also where its tokens leave early."""
    llm = LLM(load(tiny.checkpoint(tmp_path, NESTED, text=False), dtype="float32"), slots=4)
    policies = ["confidence(probability, 0.3, width=0.5)", "confidence(probability, 0.3)", "full(width=0.25)"]
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, depth=p) for p in policies]
    together = llm.generate([[5, 6, 7]] * 3, params)
    for one, made in zip(params, together, strict=True):
        alone = llm.generate([5, 6, 7], one)[0]
        assert (alone.token_ids, alone.depths) == (made.token_ids, made.depths)


@pytest.mark.parametrize(
    ("config", "policy", "words"),
    [
        (NESTED, "full(width=0.75)", "depth.width = 0.75.*must be one of 0.25, 0.5, 1"),
        ({**NESTED, "widths": []}, "fixed(2, width=0.5)", "depth.width = 0.5.*not nested by width"),
        (tiny.GLA, "full(width=0.5)", "depth.width = 0.5.*not nested by width"),
        (NESTED, DepthPolicy("full", width=0.1), "depth.width = 0.1"),
    ],
    ids=["none of its widths", "depth only", "plain", "too narrow"],
)
def test_impossible_widths_are_refused(
    tmp_path: Path, config: dict[str, Any], policy: Any, words: str
) -> None:
    llm = LLM(load(tiny.checkpoint(tmp_path, config, text=False)), slots=1)
    with pytest.raises(InvalidArgumentError, match=words):
        llm.generate([[1]], SamplingParams(depth=policy))


@pytest.mark.parametrize("width", [0.0, -1.0, 1.5, float("nan")])
def test_widths_are_shares(width: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"depth\.width"):
        DepthPolicy("full", width=width)


def test_a_width_must_give_whole_heads() -> None:
    with pytest.raises(ConfigError, match=r"0\.1 of num_attention_heads = 8"):
        family(NESTED, "x").build({**NESTED, "widths": [0.1]}, "x")


def test_sorted_fine_tuning_descends_every_sub_model(tmp_path: Path) -> None:
    """The mean over exits and widths of the losses that the sub-models have one by one; it reaches every weight."""
    _, model = family(NESTED, "x").build(NESTED, "x")
    initialise(model, 0)
    ids, batch = torch.randint(0, 61, (24,)), Batch.of_sequences([9, 15])
    loss = every_exit(model, ids, ids.roll(1), batch, 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    save(tmp_path, model, names(NESTED, "x"), NESTED, torch.float32)
    each = []
    for width in (0.25, 0.5, 1.0):
        for layers in (2, 3):
            part = load(sliced(tmp_path, width, layers), dtype="float32").model
            each.append(torch.nn.functional.cross_entropy(part(ids, replace(batch)), ids.roll(1)))
    torch.testing.assert_close(loss.detach(), torch.stack(each).mean(), rtol=0, atol=1e-5)
