"""What `fathom inspect` says, of good checkpoints and of bad ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from models.inspection import inspect
from models.load import load
from models.state import StatePool
from serving.cli import app
from serving.errors import InvalidArgumentError
from serving.inspection import bytes_of
from tests.models.reference import publish

AAREN: dict[str, Any] = {
    "model_type": "aaren", "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 3, "num_heads": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish(AAREN, tmp_path)
    return tmp_path


def test_figures_are_those_of_the_loaded_model(folder: Path) -> None:
    model = load(folder, "float32").model
    budget = 100_000
    report = inspect(folder, budget)
    assert report.usable
    assert (report.family, report.layers, report.mixers) == ("aaren", 3, {"Aaren": 3})
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.weights == {"F32": 4 * report.parameters}
    assert report.flops_per_token == model.flops()
    assert report.slots is not None
    assert StatePool(model.layout(), report.slots).nbytes <= budget
    assert StatePool(model.layout(), report.slots + 1).nbytes > budget


def test_no_budget_no_slots(folder: Path) -> None:
    assert inspect(folder).slots is None
    assert inspect(folder, 1).slots == 0


def change(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def rewrite(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BROKEN = {
    "empty": (lambda f: [file.unlink() for file in f.iterdir()], "config.json is missing"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 99999), "config.json: not valid JSON"),
    "no list": (lambda f: change(f, architectures=5, model_type=["gla"]), "model_type = ['gla']"),
    "quantised": (
        lambda f: change(f, quantization_config={"quant_method": "fp8"}),
        "quantization_config = {'quant_method': 'fp8'}: quantised weights are not supported",
    ),
    "whole numbers": (
        lambda f: rewrite(f, lambda name, tensor: tensor.to(torch.int8)),
        "tensor embeddings.weight is I8: must be F32, F16, BF16, F64",
    ),
    "no shard": (
        lambda f: index(f, {"norm.weight": "model-00001-of-00002.safetensors"}),
        "model.safetensors.index.json: model-00001-of-00002.safetensors is missing",
    ),
    "no index": (lambda f: index(f, ["norm.weight"]), "model.safetensors.index.json: weight_map must be"),
    "no token": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}'),
        "generation_config.json: eos_token_id = ['</s>']: must be token ids",
    ),
    "no template": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        "chat_template.jinja: not a text",
    ),
    "truncated": (cut, "model.safetensors: truncated"),
    "no header": (cut_header, "model.safetensors: truncated or not safetensors"),
    "pickle": (pickled, "pytorch_model.bin: pickle files are never loaded"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors"),
    "foreign": (
        lambda f: change(f, model_type="bert"),
        "config.json: model_type = 'bert': must be one of ",
    ),
    "wider": (lambda f: change(f, hidden_size=14), "has shape [31, 12], the configuration asks for [31, 14]"),
    "deeper": (lambda f: change(f, num_hidden_layers=4), "tensor layers.3.norm.weight [12] is missing"),
    "shallower": (
        lambda f: change(f, num_hidden_layers=2),
        "tensor layers.2.mixer.k_proj.weight has no place",
    ),
    "impossible": (lambda f: change(f, num_heads=5), "hidden_size = 12 must be a multiple of num_heads = 5"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_checkpoint_is_reported(case: str, folder: Path) -> None:
    breaking, message = BROKEN[case]
    breaking(folder)
    result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["problems"]
    assert any(message in problem for problem in problems), problems
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 1
    assert "cannot be served:" in shown.stdout


def test_a_good_one_is_shown(folder: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(folder), "--memory", "1 MB"])
    assert result.exit_code == 0, result.output
    for part in ("aaren", "3 Aaren", "vocabulary of 31", "constant", "sequences that fit"):
        assert part in result.stdout


def test_growing_state_counts(tmp_path: Path) -> None:
    llama = {"model_type": "llama", "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 1,
             "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 100}  # fmt: skip
    publish(llama, tmp_path)
    report = inspect(tmp_path, 1_000_000)
    assert report.state_bytes_per_token == 2 * 12 * 4
    assert report.tokens_per_sequence == 100
    page, pages = 16 * 2 * 12 * 4, 7  # 100 entries
    constant = report.state_bytes_per_sequence + 8 * pages  # type: ignore[operator] # its state and its table
    assert report.slots == (1_000_000 - page - constant) // (constant + pages * page)


def test_sizes() -> None:
    assert [bytes_of("memory", t) for t in ("7", "1.5kB", "2 MiB", "3GB")] == [7, 1500, 2 << 20, 3e9]
    for wrong in ("", "much", "3 parsecs", "-1MB"):
        with pytest.raises(InvalidArgumentError, match="memory"):
            bytes_of("memory", wrong)
