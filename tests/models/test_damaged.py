"""Checkpoints whose files lie: each is refused by file and tensor, without a traceback; what is merely odd is said."""

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from models.errors import CheckpointError, ModelError
from models.inspection import inspect
from models.load import load
from tests.models.reference import publish
from tests.models.small import SMALL

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    publish(SMALL["gla"], folder)
    return folder


def index(folder: Path, name: Any) -> None:
    places = dict.fromkeys(load_file(folder / WEIGHTS), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def head(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, HEAD: change(tensors[HEAD])}, folder / WEIGHTS)


def header(folder: Path, **entry: Any) -> None:
    """Change what the file says of its head, and nothing else."""
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    entries[HEAD] |= entry
    text = json.dumps(entries).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def twice(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({HEAD: -tensors[HEAD]}, folder / "more.safetensors")
    index(folder, WEIGHTS)
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": "more.safetensors"}}))


def outside(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder.parent / "outside.safetensors")
    index(folder, "../outside.safetensors")


def config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor in two files": (twice, "more.safetensors: tensor lm_head.weight is in model.safetensors as well"),
    "a path out of the folder": (outside, "index.json: '../outside.safetensors' is no name of a file beside it"),
    "a path from the root": (lambda f: index(f, str(f / WEIGHTS)), "is no name of a file beside it"),
    "a name that is none": (lambda f: index(f, None), "index.json: None is no name of a file beside it"),
    "a name without end": (lambda f: index(f, "a" * 5000), "is no name of a file beside it"),
    "eight bits beside others": (
        lambda f: head(f, lambda t: t.to(torch.float8_e4m3fn)),
        "tensor lm_head.weight is F8_E4M3: must be ",
    ),
    "four bits": (lambda f: header(f, dtype="I4"), "model.safetensors: truncated or not safetensors"),
    "no rows": (
        lambda f: head(f, lambda t: t[:0]),
        "tensor lm_head.weight has shape [0, 24], the configuration asks for [61, 24]",
    ),
    "one number": (lambda f: head(f, lambda t: t[0, 0].clone()), "has shape [1], the configuration asks for [61, 24]"),
    "a shape beyond its bytes": (lambda f: header(f, shape=[2**40, 2**40]), "model.safetensors: truncated"),
    "bytes beyond the file": (lambda f: header(f, data_offsets=[0, 2**50]), "model.safetensors: truncated"),
    "another tensor's bytes": (lambda f: header(f, data_offsets=[0, 4]), "model.safetensors: truncated"),
    "a header of a terabyte": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 10**12) + b"{}"),
        "model.safetensors: truncated",
    ),
    "a header without end": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5),
        "model.safetensors: truncated",
    ),
    "more than there can be": (
        lambda f: config(f, vocab_size=10**9),
        "has shape [61, 24], the configuration asks for [1000000000, 24]",
    ),
    "layers without end": (lambda f: config(f, num_hidden_layers=10**4), "num_hidden_layers = 10000: "),
    "a number that is none": (lambda f: config(f, norm_eps={"__float__": [1]}), "norm_eps = {'__float__': [1]}: "),
    "a value without end": (lambda f: config(f, vocab_size=[1] * 10**5), "vocab_size = [1, 1, 1, "),
    "nested YAML": (lambda f: (f / "config.yaml").write_text("[" * 3000), "config.yaml: not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_refused(case: str, folder: Path) -> None:
    damage, message = DAMAGED[case]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2000
    problems = inspect(folder).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers(value: float, folder: Path) -> None:
    def spoil(tensor: Tensor) -> Tensor:
        tensor[3, 5] = value
        return tensor

    head(folder, spoil)
    expected = rf"model\.safetensors: tensor lm_head\.weight \[61, 24\]: 1 of its 1464 values .* {value}"
    with pytest.raises(CheckpointError, match=expected):
        load(folder)


def test_values_too_large_for_the_type(folder: Path) -> None:
    """The largest numbers of float32 are numbers there, even where their sum is none; in float16 they are not."""
    head(folder, lambda tensor: torch.full_like(tensor, 3e38))
    load(folder, "float32")
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight has values up to 3e\+38, too large for torch\.float16"
    ):
        load(folder, "float16")


def test_a_date_in_the_training_configuration(folder: Path) -> None:
    (folder / "config.yaml").write_text("started: 2026-01-31\n")
    assert load(folder, "float32").fingerprint


def test_tokens_that_the_vocabulary_lacks(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Published checkpoints name such tokens; they can be neither read nor said."""
    config(folder, bos_token_id=61, eos_token_id=[3, 2**40], pad_token_id=99)
    Tokenizer(WordLevel({f"w{i}": i for i in range(70)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, "fathom.models"):
        assert load(folder, "float32").eos_token_ids == (3,)
    warnings = inspect(folder).warnings
    assert [w.partition(":")[0] for w in warnings] == [
        "bos_token_id = 61", f"eos_token_id = {2**40}", "tokenizer.json knows 70 tokens, the model 61"
    ]  # fmt: skip
    assert all(warning in caplog.text for warning in warnings)
