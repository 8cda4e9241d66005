"""Checkpoints as people publish them: what a library makes of them beside the plain case."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.batch import Batch
from models.errors import CheckpointError
from models.inspection import inspect
from models.load import load
from tests.models.reference import publish
from tests.models.small import SMALL

Tensors = dict[str, Tensor]


def rewrite(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    save_file(tensors, folder / name)


def logits(folder: Path) -> Tensor:
    assert inspect(folder).usable
    model = load(folder, "float32").model
    return model(torch.arange(9), Batch.of_sequences([9]))


def tied(name: str, folder: Path) -> tuple[Tensors, Tensor, str]:
    """Its weights, the logits that they make, and what the embeddings are called."""
    publish({**SMALL[name], "tie_word_embeddings": True}, folder)
    tensors = load_file(folder / "model.safetensors")
    return tensors, logits(folder), next(key for key in tensors if "embed" in key)


@pytest.mark.parametrize("name", ["gla", "mamba", "rwkv", "qwen3_next"])
def test_a_base_without_its_head(name: str, tmp_path: Path) -> None:
    tensors, expected, _ = tied(name, tmp_path)
    rewrite(tmp_path, {key.partition(".")[2]: tensor for key, tensor in tensors.items()})
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize(("name", "head"), [("gla", "lm_head.weight"), ("rwkv", "head.weight")])
def test_both_of_tied_weights(name: str, head: str, tmp_path: Path) -> None:
    """Equal ones are one; where they differ the head is one of its own, whatever the configuration says."""
    tensors, expected, embeddings = tied(name, tmp_path)
    rewrite(tmp_path, {**tensors, head: tensors[embeddings].clone()})
    assert torch.equal(logits(tmp_path), expected)
    rewrite(tmp_path, {**tensors, head: -tensors[embeddings]})
    torch.testing.assert_close(logits(tmp_path), -expected)


def test_the_other_of_tied_weights(tmp_path: Path) -> None:
    tensors, expected, embeddings = tied("gla", tmp_path)
    tensors["lm_head.weight"] = tensors.pop(embeddings)
    rewrite(tmp_path, tensors)
    assert torch.equal(logits(tmp_path), expected)


def test_an_untied_head_that_is_not_there(tmp_path: Path) -> None:
    publish(SMALL["gla"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    rewrite(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight \[61, 24\] is missing"):
        load(tmp_path)


def test_shards_and_what_lies_beside_them(tmp_path: Path) -> None:
    tensors, expected, embeddings = tied("gla", tmp_path)
    noise = {key: torch.full_like(tensor, 9.0) for key, tensor in tensors.items()}
    save_file(noise, tmp_path / "consolidated.safetensors")
    assert torch.equal(logits(tmp_path), expected)
    rest = {key: tensor for key, tensor in tensors.items() if key != embeddings}
    rewrite(tmp_path, rest, "model-00001-of-00002.safetensors")
    rewrite(tmp_path, {embeddings: tensors[embeddings]}, "model-00002-of-00002.safetensors")
    places = {key: f"model-0000{1 + (key == embeddings)}-of-00002.safetensors" for key in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        (5, None, (5,)),
        (None, None, ()),
        ([5, 6], None, (5, 6)),
        (-1, None, ()),
        (5, 7, (7,)),
        (5, [7, 8], (7, 8)),
    ],
)
def test_what_ends_a_text(config: Any, generation: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    publish({**SMALL["gla"], "eos_token_id": config}, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load(tmp_path).eos_token_ids == ids
