"""What looped models write into their rows on a CPU is what their definitions make of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.batch import Batch
from models.depth.looped import LoopedDecoder
from models.depth.mor import ExpertChoice
from models.load import load
from tests import tiny

BASE: dict[str, Any] = {
    "model_type": "gla", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_heads": 3,
    "intermediate_size": 20,
}  # fmt: skip
ROWS = 70
DEPTHS = torch.arange(ROWS) % 3


def looped(folder: Path, config: dict[str, Any]) -> LoopedDecoder:
    model = load(tiny.checkpoint(folder, {"base": BASE, **config}, text=False), "float32").model
    assert isinstance(model, LoopedDecoder)
    return model


def batch() -> Batch:
    return Batch(torch.arange(1, ROWS + 1), DEPTHS, torch.arange(ROWS + 1), torch.zeros(ROWS).long())


@pytest.mark.parametrize("function", ["sigmoid", "tanh", None])
@pytest.mark.parametrize("gating", ["residual", "weighted", None])
def test_of_routed_tokens(function: str | None, gating: str | None, tmp_path: Path) -> None:
    expert = {"router_func": function, "alpha": 0.7, "sampling": "aux_loss", "gating": gating}
    mor = {"type": "expert", "capacity": "1,0.6,0.3", "temp": 0.5, "expert": expert}
    model = looped(tmp_path, {"model_type": "routed", "num_recursions": 3, "mor": mor})
    assert isinstance(model, ExpertChoice) and model._routing is not None
    x, made = torch.randn(2, ROWS, 24)
    with torch.inference_mode():
        first = model.first_rows(x, batch())
        following = model.next_rows(first, made, batch())
        model._routing = None
        torch.testing.assert_close(first, model.first_rows(x, batch()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(following, model.next_rows(first, made, batch()), rtol=1e-5, atol=1e-5)
    assert (
        0 < following[:, -1].mean() < 1 and first[:, -1].sum() == 0
    )  # of the first recursion everybody is one


@pytest.mark.parametrize("skipped", ["absent", "last_exited"])
def test_of_a_gate(skipped: str, tmp_path: Path) -> None:
    config = {"model_type": "recursive", "sharing": "middle_cycle", "num_recursions": 3, "exit_gate": True}
    model = looped(tmp_path, {**config, "skipped": skipped})
    assert model._gate is not None
    rows, made = torch.rand(ROWS, model.row_width), torch.randn(ROWS, 24)
    kept = (torch.randn(ROWS, 24), DEPTHS[:, None].float()) if skipped == "last_exited" else ()
    with torch.inference_mode():
        following = model.next_rows(rows, made, batch(), *kept)
        model._gate = None
        torch.testing.assert_close(
            following, model.next_rows(rows, made, batch(), *kept), rtol=1e-5, atol=1e-5
        )
