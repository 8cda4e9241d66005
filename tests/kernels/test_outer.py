"""Outer-product kernels: naive = scan = numba steps = Triton steps, whatever the shapes and variants."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.outer import _on_cpu, _on_gpu, outer_naive, outer_scan, outer_train
from kernels.tiles import tile
from tests.kernels.compile_ahead import compile_ahead
from tests.kernels.pools import poisoned_pool, untouched

DECAYS = ["none", "head", "channel"]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [_on_cpu, _on_gpu], ids=["numba", "triton"])


def inputs(
    lengths: list[int], heads: tuple[int, int, int], K: int, V: int, decay: str, bonus: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """q, k, v, g, u, states, offsets."""
    torch.manual_seed(sum(lengths) + K)
    hq, hk, hv = heads
    T, H = sum(lengths), max(hk, hv)
    g = {"none": None, "head": -3 * torch.rand(T, H), "channel": -9 * torch.rand(T, hk, K)}[decay]
    return (
        torch.randn(T, hq, K),
        torch.randn(T, hk, K),
        torch.randn(T, hv, V),
        g,
        torch.randn(H, K) if bonus else None,
        torch.randn(len(lengths), H, K, V),
        torch.tensor([0, *lengths]).cumsum(0),
    )


def naive(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, u: Tensor | None, states: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    outs, ends = [], []
    for n, (a, b) in enumerate(pairwise(offsets)):
        o, s = outer_naive(q[a:b], k[a:b], v[a:b], None if g is None else g[a:b], states[n], 0.3, u)
        outs.append(o)
        ends.append(s)
    return torch.cat(outs), torch.stack(ends)


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)
head_counts = st.sampled_from([(1, 1, 1), (3, 3, 3), (4, 2, 2), (2, 2, 6), (1, 1, 3), (6, 3, 3)])


@given(lengths, head_counts, st.integers(1, 9), st.integers(1, 9), st.sampled_from(DECAYS), st.booleans())
def test_scan_equals_naive(
    lengths: list[int], heads: tuple[int, int, int], K: int, V: int, decay: str, bonus: bool
) -> None:
    q, k, v, g, u, states, offsets = inputs(lengths, heads, K, V, decay, bonus)
    expected = naive(q, k, v, g, u, states, offsets)
    got = outer_scan(q, k, v, g, states, offsets, 0.3, u)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@pytest.mark.parametrize("heads", [(3, 3, 3), (4, 2, 2), (2, 2, 6)], ids=["equal", "grouped_q", "grouped_qk"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 0, 6]], ids=["decode", "mixed"])
def test_steps_equal_naive(implementation, decay, bonus, heads, lengths):  # type: ignore[no-untyped-def]
    q, k, v, g, u, states, offsets = inputs(lengths, heads, 7, 5, decay, bonus)
    expected, ends = naive(q, k, v, g, u, states, offsets)
    slots = torch.tensor([3, 5, 1, 8])[: len(lengths)]
    depths = torch.tensor([0, 2, 1, 2])[: len(lengths)]
    pool = poisoned_pool(states, slots, depths)
    got = implementation(q, k, v, g, u, pool, slots, depths, offsets, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[slots, depths], ends, rtol=1e-5, atol=1e-5)
    assert untouched(pool, slots, depths)


@given(lengths, st.integers(1, 9), st.integers(1, 9), st.sampled_from(DECAYS))
def test_strong_decay_neither_overflows_nor_loses_precision(
    lengths: list[int], K: int, V: int, decay: str
) -> None:
    q, k, v, g, u, states, offsets = inputs(lengths, (2, 2, 2), K, V, decay, False)
    g = None if g is None else 40 * g  # e^-360 a token: far beyond float32, both ways
    expected = naive(q, k, v, g, u, states, offsets)
    got = outer_scan(q, k, v, g, states, offsets, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads", [(3, 3, 3), (4, 2, 2)], ids=["equal", "grouped"])
def test_training_gradient_equals_autograd_through_the_scan(decay: str, heads: tuple[int, int, int]) -> None:
    q, k, v, g, _, states, offsets = inputs([30, 1, 70], heads, 7, 5, decay, False)
    leaves = [x.requires_grad_() for x in (q, k, v, *([] if g is None else [g]))]
    by_scan = outer_scan(q, k, v, g, torch.zeros_like(states), offsets, 0.3)[0]
    trained = outer_train(q, k, v, g, offsets, 0.3)
    weight = torch.randn_like(by_scan)
    torch.testing.assert_close(trained, by_scan, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad((by_scan * weight).sum(), leaves)
    got = torch.autograd.grad((trained * weight).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@IMPLEMENTATIONS
def test_slot_index_arithmetic_is_64_bit(implementation) -> None:  # type: ignore[no-untyped-def]
    """A slot whose offset passes 2^31 elements. The pool is virtual memory; only two slots of it are ever touched."""
    H, K, V, slot = 4, 64, 64, 140_000
    assert slot * H * K * V > 2**31
    q, k, v, _, _, states, offsets = inputs([1], (H, H, H), K, V, "none", False)
    expected, _ = outer_naive(q, k, v, None, states[0], 0.3)
    pool = torch.empty(slot + 1, 1, H, K, V)
    pool[slot, 0] = states[0]
    index = torch.tensor([slot]), torch.tensor([0]), offsets
    got = implementation(q, k, v, None, None, pool, *index, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@IMPLEMENTATIONS
def test_padded_rows_leave_live_slots_alone(implementation) -> None:  # type: ignore[no-untyped-def]
    q, k, v, g, _, states, offsets = inputs([1, 1, 1], (2, 2, 2), 4, 4, "head", False)
    expected, ends = naive(q, k, v, g, None, states, offsets)
    slots, depths = torch.tensor([2, 0, 0]), torch.tensor([0, 0, 0])
    pool = torch.zeros(4, 1, *states.shape[1:])
    pool[2, 0] = states[0]
    got = implementation(q, k, v, g, None, pool, slots, depths, offsets, 0.3)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[2, 0], ends[0], rtol=1e-5, atol=1e-5)
    assert not pool[1].any() and not pool[3].any()


@pytest.mark.parametrize(
    ("K", "V", "grid"), [(64, 128, 64), (64, 128, 4096), (128, 128, 4096), (256, 256, 4096)]
)
@pytest.mark.parametrize("decay", [0, 1, 2], ids=DECAYS)
def test_compiles_ahead_for_sm_90_without_spills(K: int, V: int, grid: int, decay: int) -> None:
    chosen = tile("outer", K, V, grid, torch.device("cuda"))
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "u_ptr"), "*bf16")
    indices = dict.fromkeys(("slots_ptr", "depths_ptr", "offsets_ptr"), "*i64")
    signature = {
        **pointers, **indices, "g_ptr": "*fp32", "pool_ptr": "*fp32",
        "scale": "fp32", "slot_stride": "i64", "depth_stride": "i64",
    }  # fmt: skip
    constexprs = {
        "H": 4, "HQ": 4, "HK": 4, "HV": 4, "HG": 4, "HO": 4, "K": K, "V": V, "BLOCK_K": K, "BLOCK_V": chosen.block_v,
        "DECAY": decay, "BONUS": False,
    }  # fmt: skip
    options = {"signature": signature, "constexprs": constexprs, "warps": chosen.warps}
    cost = compile_ahead("kernels.outer.step_triton", "outer_step_kernel", options)
    print(f"K={K} V={V} decay={decay}: {cost['registers']} registers, {cost['spills']} bytes spilled")
    assert cost["spills"] == 0
