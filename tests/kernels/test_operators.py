"""The registered operators change what their schemas say, nothing else, and return the shapes that
torch.compile is told. (Those of the delta and diagonal kernels: in their own tests.)"""

import importlib
from typing import Any

import pytest
import torch

SLOTS, DEPTHS, OFFSETS = torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([0, 2, 3])
INDEX = SLOTS, DEPTHS, OFFSETS
T = 3


def pool(*shape: int) -> torch.Tensor:
    return torch.zeros(3, 1, *shape)


def _arguments() -> dict[str, tuple[Any, ...]]:
    q, k, v = torch.randn(T, 4, 6), torch.randn(T, 2, 6), torch.randn(T, 2, 5)
    x, weight = torch.randn(T, 8), torch.randn(8, 3)
    gates = torch.randn(T, 2), torch.randn(T, 2)
    pages, tables = torch.zeros(7, 4, 2, 6), torch.arange(6).view(3, 1, 2) + 1
    entries = torch.tensor([0, 1, 0])
    return {
        "outer_step": (q, k, v, -torch.rand(T, 2, 5), None, pool(2, 6, 5), *INDEX, 1.0, True),
        "mlstm_normalise": (k, k + 1, *gates, pool(2, 6), pool(2), *INDEX, 1.0, 1e-6),
        "plstm_step": (
            torch.randn(T, 2, 3, 4, 6), torch.randn(T, 2, 1, 6), torch.randn(T, 2, 4, 1, 5),
            torch.randn(T, 2, 4, 4), pool(2, 4, 6, 5), *INDEX,
        ),
        "cell_step": (
            torch.randn(T, 4, 2, 6), torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6), pool(2, 2, 6),
            *INDEX, "lstm",
        ),
        "conv_step": (x, weight, None, pool(2, 8), *INDEX, True),
        "conv_ring": (x, weight, None, pool(4, 8), pool(1), *INDEX, 2, True),
        "conv_ring/taps": (x, None, None, pool(4, 8), pool(1), *INDEX, 2, False),
        "attention_step/ring": (
            q, k, v, pool(5, 2, 6), pool(5, 2, 5), None, pool(1), *INDEX, None, 1.0, None, 5,
        ),
        "attention_step/pages": (
            q, k, k + 1, pages, pages.clone(), tables, pool(1), *INDEX, None, 1.0, 30.0, None,
        ),
        "attention_step/read": (
            q, None, None, pages, pages.clone(), tables, pool(1), *INDEX, entries, 1.0, None, None,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _arguments())
def test_operator_keeps_its_schema(name: str) -> None:
    for module in ("attention", "cell", "conv", "outer.mlstm", "outer.plstm"):
        importlib.import_module(f"kernels.{module}")  # registers
    operator = getattr(torch.ops.fathom, name.split("/")[0]).default
    torch.library.opcheck(operator, _arguments()[name], test_utils=("test_schema", "test_faketensor"))
