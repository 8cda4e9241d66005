"""Operations of adaptive depth: naive = numba = Triton, and what may follow from neighbours in a batch: nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels.depth as ops
from tests.kernels.compile_ahead import compile_ahead

LORA = pytest.mark.parametrize("step", [ops._lora_on_cpu, ops._lora_on_gpu], ids=["numba", "triton"])
COMPACT = pytest.mark.parametrize("step", [ops._compact_on_cpu, ops._compact_on_gpu], ids=["numba", "triton"])
CONFIDENCE = pytest.mark.parametrize(
    "step", [ops._confidence_on_cpu, ops._confidence_on_gpu], ids=["numba", "triton"]
)
SIZES = [7, 2, 5]


def factors(
    T: int, inputs: int = 11, rank: int = 3, depths: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, A = torch.randn(T, inputs), torch.randn(depths, len(SIZES), rank, inputs)
    return x, A, torch.randn(depths, sum(SIZES), rank), torch.randint(0, depths, (T,))


@LORA
@pytest.mark.parametrize(("T", "rank"), [(1, 1), (5, 3), (9, 8)])
def test_lora_by_depth(step: Any, T: int, rank: int) -> None:
    case = factors(T, rank=rank)
    expected = ops.depth_lora_naive(*case, SIZES)
    torch.testing.assert_close(step(*case, SIZES), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops._train(*case, SIZES), expected, rtol=1e-5, atol=1e-5)


@LORA
def test_a_tokens_lora_does_not_depend_on_its_neighbours(step: Any) -> None:
    x, A, B, depths = factors(6)
    together = step(x, A, B, depths, SIZES)
    for t in range(6):
        assert torch.equal(step(x[t : t + 1], A, B, depths[t : t + 1], SIZES)[0], together[t])


def test_lora_is_differentiable() -> None:
    x, A, B, depths = factors(4)
    A.requires_grad_(), B.requires_grad_()
    ops.depth_lora(x, A, B, depths, SIZES).square().sum().backward()
    assert A.grad is not None and A.grad.abs().sum() > 0 and B.grad is not None
    unused = [d for d in range(4) if d not in depths.tolist()]
    assert not A.grad[unused].any(), "a depth that no token is at learns nothing"


@COMPACT
@settings(max_examples=8)
@given(keys=st.lists(st.integers(0, 3), max_size=40))
def test_compaction_is_stable_and_complete(step: Any, keys: list[int]) -> None:
    given_keys = torch.tensor(keys, dtype=torch.int64)
    order, bounds = step(given_keys, 4)
    expected_order, expected_bounds = ops.compact_naive(given_keys, 4)
    assert order.tolist() == expected_order.tolist() and bounds.tolist() == expected_bounds.tolist()
    assert sorted(order.tolist()) == list(range(len(keys)))


@COMPACT
def test_compaction_of_more_than_a_block(step: Any) -> None:
    keys = torch.randint(0, 2, (2500,))
    order, bounds = step(keys, 2)
    assert torch.equal(order[: int(bounds[1])], (keys == 0).nonzero().squeeze(1))
    assert torch.equal(order[int(bounds[1]) :], (keys == 1).nonzero().squeeze(1))


@CONFIDENCE
@pytest.mark.parametrize(
    ("T", "D", "V", "bias", "softcap"),
    [(1, 5, 3, False, None), (18, 20, 150, True, None), (3, 70, 130, False, 5.0), (1, 4, 4100, True, 8.0)],
    ids=str,
)
def test_confidence_without_the_logits(
    step: Any, T: int, D: int, V: int, bias: bool, softcap: float | None
) -> None:
    x, weight = torch.randn(T, D), torch.randn(V, D)
    head = weight, torch.randn(V) if bias else None, softcap
    torch.testing.assert_close(step(x, *head), ops.confidence_naive(x, *head), rtol=1e-4, atol=1e-5)


@CONFIDENCE
def test_confidence_at_its_ends(step: Any) -> None:
    """Certain, undecided between two, and of one token only."""
    sure = torch.zeros(40, 2)
    sure[7, 0], sure[3, 1], sure[30, 1] = 80.0, 50.0, 50.0
    certain, torn = step(torch.eye(2), sure, None, None).tolist()
    assert certain == pytest.approx([1, 1, 0, 7], abs=1e-5)
    assert torn[:3] == pytest.approx([0.5, 0, 0.6931472], abs=1e-5) and torn[3] == 3
    assert step(torch.ones(1, 2), torch.ones(1, 2), None, None)[0].tolist() == pytest.approx(
        [1, 1, 0, 0], abs=1e-6
    )


def test_nobody_leaves_by_logits_that_are_no_numbers() -> None:
    """Neither at least so sure nor at most so unsure: NaN compares with nothing."""
    logits = torch.randn(3, 40)
    logits[1, 7] = float("nan")
    measures = ops.confidence_of(logits)[:, :3]
    assert measures[1].isnan().all() and not measures[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", ["depth_lora", "compact", "confidence"])
def test_operators_keep_their_schemas(name: str) -> None:
    cases: dict[str, tuple[Any, ...]] = {
        "depth_lora": (*factors(3), SIZES),
        "compact": (torch.tensor([1, 0, 1]), 2),
        "confidence": (torch.randn(2, 4), torch.randn(9, 4), None, 3.0),
    }
    operator = getattr(torch.ops.fathom, name).default
    torch.library.opcheck(operator, cases[name], test_utils=("test_schema", "test_faketensor"))


KERNELS: dict[str, dict[str, Any]] = {
    "depth_lora_kernel": {
        "signature": {"depths_ptr": "*i64", "bounds_ptr": "*i64"}
        | dict.fromkeys(("x_ptr", "A_ptr", "B_ptr", "out_ptr"), "*bf16"),
        "constexprs": {"IN": 2048, "OUT": 6144, "PARTS": 3, "R": 64, "BLOCK_R": 64, "BLOCK_I": 64, "BLOCK_O": 64},
    },
    "compact_kernel": {
        "signature": dict.fromkeys(("keys_ptr", "order_ptr", "bounds_ptr"), "*i64") | {"T": "i32"},
        "constexprs": {"GROUPS": 4, "BLOCK": 256},
    },
    "confidence_kernel": {
        "signature": dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), "*bf16")
        | {"stats_ptr": "*fp32", "likeliest_ptr": "*i64", "softcap": "fp32", "T": "i32", "V": "i32"},
        "constexprs": {
            "D": 2048, "SPLIT": 4096, "BIAS": 0, "SOFTCAP": 0, "BLOCK_T": 16, "BLOCK_V": 64, "BLOCK_D": 64,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_ahead_for_sm_90_without_spills(name: str) -> None:
    cost = compile_ahead("kernels.depth.step_triton", name, {**KERNELS[name], "warps": 4})
    print(f"{name}: {cost['registers']} registers, {cost['spills']} bytes spilled, {cost['shared']} shared")
    assert cost["spills"] == 0 and cost["shared"] <= 227 * 1024
