"""The halves of a layer that run in one call on a CPU are what their parts make of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.invariance import Invariance
from kernels.pool import Floats, as_float32
from models.batch import Batch
from models.decoder import Block
from models.load import load
from models.state import StatePool
from tests import tiny

GLA: dict[str, Any] = {
    "model_type": "gla", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_heads": 3,
    "intermediate_size": 37, "expand_v": 2.0,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3,
    "intermediate_size": 37, "mlp_bias": True,
}  # fmt: skip
LENGTHS = [1, 1, 40, 1, 7]  # of segments


def block_of(config: dict[str, Any], folder: Path, weights: str = "auto") -> tuple[Block, StatePool]:
    model = load(tiny.checkpoint(folder, config, text=False), "float32", weights=weights).model
    return model.blocks[0], StatePool(model.layout(), len(LENGTHS), tokens=1024, longest=64)


def batch_of(lengths: list[int]) -> Batch:
    zeros, offsets = torch.zeros(len(lengths), dtype=torch.int64), torch.tensor([0, *lengths]).cumsum(0)
    return Batch(torch.arange(1, len(lengths) + 1), zeros, offsets, torch.zeros(sum(lengths)).long())


def passed(block: Block, pool: StatePool, x: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out, and the state behind it, from a state of ones."""
    state = pool.layers[0]
    state["S"].fill_(1.0)
    return block(x, batch_of(LENGTHS), state), state["S"].clone()


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_of_gla(gated: bool, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.int8.LEAST", 1)
    block, pool = block_of({**GLA, "use_output_gate": gated}, tmp_path, weights)
    x = torch.randn(sum(LENGTHS), 24, generator=torch.Generator().manual_seed(0))
    assert block._mixed is not None and block._fed is not None
    with torch.inference_mode():
        out, state = passed(block, pool, x)
        block._mixed = block._fed = None
        expected, expected_state = passed(block, pool, x)
    # With eight bits inputs are rounded too: a last bit may turn one of them by a step.
    off, least = (2e-3, 2e-3) if weights == "int8" else (1e-5, 1e-6)
    torch.testing.assert_close(out, expected, rtol=off, atol=off)
    torch.testing.assert_close(state, expected_state, rtol=off, atol=least)


def test_a_stage_in_halves_is_its_layers_one_after_the_other(tmp_path: Path) -> None:
    """To the bit, whether arrays go from one to the next or tensors; and whoever looks at a layer sees it run."""
    config = {**GLA, "num_hidden_layers": 3}
    model = load(tiny.checkpoint(tmp_path, config, text=False), "float32").model
    x, seen = torch.randn(sum(LENGTHS), 24), []

    def ran() -> tuple[Tensor, list[Tensor]]:
        pool = StatePool(model.layout(), len(LENGTHS))
        return model.run(0, x, batch_of(LENGTHS), pool.layers), [layer["S"] for layer in pool.layers]

    with torch.inference_mode():
        assert model._in_halves(range(3))
        out, states = ran()
        hook = model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        assert not model._in_halves(range(3))
        expected, expected_states = ran()
        hook.remove()
    assert seen and torch.equal(out, expected)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(states, expected_states, strict=True))


def test_a_skipped_layer_is_given_the_same_state(tmp_path: Path) -> None:
    """Whether a token passes a layer, or skips it and only writes."""
    block, pool = block_of(GLA, tmp_path)
    x, batch, state = torch.randn(3, 24), batch_of([1, 1, 1]), pool.layers[0]
    state["S"].zero_()
    with torch.inference_mode():
        block(x, batch, state)
        passed_through = state["S"].clone()
        state["S"].zero_()
        block.fill(x, batch, state)
    assert torch.equal(state["S"], passed_through) and passed_through.any()


def test_of_any_gated_mlp(tmp_path: Path) -> None:
    block, _ = block_of(LLAMA, tmp_path)
    x = torch.randn(9, 24)
    assert block._mixed is None and block._fed is not None and block.mlp is not None
    with torch.inference_mode():
        fed, expected = torch.from_numpy(block._fed(as_float32(x))), x + block.mlp(block.mlp_norm(x))  # type: ignore[misc]
        torch.testing.assert_close(fed, expected, rtol=1e-5, atol=1e-5)


def test_a_lora_by_depth_keeps_the_parts(tmp_path: Path) -> None:
    """It adds to what each projection gives."""
    looped = {"model_type": "recursive", "base": GLA, "sharing": "cycle", "num_recursions": 2, "lora_rank": 2}
    block, _ = block_of(looped, tmp_path)
    assert block._mixed is None and block._fed is None


@pytest.mark.parametrize("invariant", [True, False], ids=["invariant", "not"])
def test_many_rows(invariant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row may depend on the others, those of a long prompt are for BLAS."""
    monkeypatch.setattr(Invariance, "on", invariant)
    block, pool = block_of(GLA, tmp_path)
    taken = []

    def fed(x: Floats) -> Floats:
        taken.append(len(x))
        return x

    block._fed = fed
    with torch.inference_mode():
        for rows in (64, 65):
            block(torch.randn(rows, 24), batch_of([rows]), pool.layers[0])
    assert taken == ([64, 65] if invariant else [64])
