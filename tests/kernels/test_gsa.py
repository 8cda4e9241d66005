"""Gated slot attention, and the outer product that decays by value under it: naive = scan = steps = FLA's
naive."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.outer import _on_cpu, _on_gpu, outer, outer_naive, outer_scan
from kernels.outer.gsa import gsa, gsa_naive, gsa_scan
from kernels.tiles import tile
from tests.kernels.compile_ahead import compile_ahead
from tests.kernels.pools import poisoned_pool, untouched

HEADS = [(3, 3), (4, 2)]


def inputs(
    lengths: list[int], heads: tuple[int, int], K: int, M: int, V: int, strength: float = 4.0
) -> tuple:
    """(q, k, v, s, g), states (Hk, Hv), offsets."""
    torch.manual_seed(sum(lengths) + K)
    T, N, (Hq, H) = sum(lengths), len(lengths), heads
    g = -strength * torch.rand(T, H, M)
    packed = torch.randn(T, Hq, K), torch.randn(T, H, K), torch.randn(T, H, V), 1 - g.exp(), g
    return packed, (torch.randn(N, H, K, M), torch.randn(N, H, M, V)), torch.tensor([0, *lengths]).cumsum(0)


def naive(packed: tuple[Tensor, ...], states: tuple[Tensor, Tensor], offsets: Tensor) -> tuple[Tensor, tuple]:
    outs, ends = [], []
    for n, (a, b) in enumerate(itertools.pairwise(offsets)):
        out, end = gsa_naive(*(x[a:b] for x in packed), (states[0][n], states[1][n]), 0.3)
        outs.append(out)
        ends.append(end)
    return torch.cat(outs), tuple(torch.stack(parts) for parts in zip(*ends, strict=True))


lengths = st.lists(st.integers(0, 24), min_size=1, max_size=4).filter(any)
sizes = st.integers(1, 9)


@given(lengths, st.sampled_from(HEADS), sizes, sizes, sizes, st.sampled_from([0.5, 40.0]))
@example([130, 64], (4, 2), 5, 3, 4, 4.0)  # beyond one chunk of the scan
def test_scan_equals_naive(
    lengths: list[int], heads: tuple[int, int], K: int, M: int, V: int, strength: float
) -> None:
    packed, states, offsets = inputs(lengths, heads, K, M, V, strength)
    torch.testing.assert_close(
        gsa_scan(*packed, states, offsets, 0.3), naive(packed, states, offsets), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("heads", HEADS, ids=["equal", "grouped"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 0, 6]], ids=["decode", "mixed"])
@pytest.mark.parametrize("implementation", [_on_cpu, _on_gpu], ids=["numba", "triton"])
def test_steps_equal_naive(heads, lengths, implementation, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    packed, states, offsets = inputs(lengths, heads, 7, 6, 5)
    expected, ends = naive(packed, states, offsets)
    slots, depths = torch.tensor([3, 5, 1, 8])[: len(lengths)], torch.tensor([0, 2, 1, 2])[: len(lengths)]
    pools = [poisoned_pool(x, slots, depths) for x in states]
    monkeypatch.setattr("kernels.outer.outer_step", implementation)
    got = gsa(*packed, *pools, slots, depths, offsets, scale=0.3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for pool, end in zip(pools, ends, strict=True):
        torch.testing.assert_close(pool[slots, depths], end, rtol=1e-5, atol=1e-5)
        assert untouched(pool, slots, depths)


@pytest.mark.parametrize("heads", HEADS, ids=["equal", "grouped"])
def test_equals_flash_linear_attention(heads: tuple[int, int]) -> None:
    oracle = pytest.importorskip("fla.ops.gsa.naive")
    packed, (Hk, Hv), offsets = inputs([17], heads, 8, 6, 5)
    batched = [x.unsqueeze(0) for x in packed]
    expected, ends = oracle.naive_recurrent_gsa(
        *batched, scale=0.3, initial_state=(Hk, Hv), output_final_state=True
    )
    got = gsa_scan(*packed, (Hk, Hv), offsets, 0.3)
    torch.testing.assert_close(got, (expected[0], tuple(ends)), rtol=1e-4, atol=1e-4)


def test_training_is_the_scan_from_zero_with_finite_gradients() -> None:
    packed, states, offsets = inputs([30, 1, 70], (4, 2), 7, 6, 5, strength=60.0)
    leaves = [x.requires_grad_() for x in packed]
    none = torch.zeros(3, dtype=torch.int64)
    trained = gsa(*leaves, None, None, none, none, offsets, scale=0.3)
    by_scan = gsa_scan(*leaves, tuple(torch.zeros_like(x) for x in states), offsets, 0.3)[0]
    weight = torch.randn_like(trained)
    torch.testing.assert_close(trained, by_scan, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad((trained * weight).sum(), leaves)
    expected = torch.autograd.grad((by_scan * weight).sum(), leaves)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@given(lengths, st.sampled_from([(1, 1, 1), (4, 2, 2), (1, 1, 3)]), sizes, sizes)
def test_decay_by_value_scan_equals_naive(
    lengths: list[int], heads: tuple[int, int, int], K: int, V: int
) -> None:
    torch.manual_seed(sum(lengths))
    hq, hk, hv = heads
    T, H = sum(lengths), max(hk, hv)
    q, k, v, g = (
        torch.randn(T, hq, K),
        torch.randn(T, hk, K),
        torch.randn(T, hv, V),
        -9 * torch.rand(T, hv, V),
    )
    states, offsets = torch.randn(len(lengths), H, K, V), torch.tensor([0, *lengths]).cumsum(0)
    got, ends = outer_scan(q, k, v, g, states, offsets, 0.3, by_value=True)
    for n, (a, b) in enumerate(itertools.pairwise(offsets)):
        expected, end = outer_naive(q[a:b], k[a:b], v[a:b], g[a:b], states[n], 0.3, by_value=True)
        torch.testing.assert_close(got[a:b], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ends[n], end, rtol=1e-4, atol=1e-4)


def test_decay_by_value_refuses_what_it_cannot_do() -> None:
    (q, k, _v, s, g), (_Hk, _), offsets = inputs([2], (1, 1), 3, 3, 3)
    none = torch.zeros(1, dtype=torch.int64)
    for decay, bonus in ((None, None), (g[..., 0], None), (g, torch.ones(1, 3))):
        with pytest.raises(ValueError, match="by_value"):
            outer(q, k, s, decay, None, none, none, offsets, scale=1.0, bonus=bonus, by_value=True)


@pytest.mark.parametrize(("K", "V", "grid"), [(128, 64, 64), (256, 64, 4096), (512, 64, 4096)])
def test_compiles_ahead_for_sm_90_without_spills(K: int, V: int, grid: int) -> None:
    chosen = tile("outer", K, V, grid, torch.device("cuda"))
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "u_ptr"), "*bf16")
    indices = dict.fromkeys(("slots_ptr", "depths_ptr", "offsets_ptr"), "*i64")
    signature = {
        **pointers, **indices, "g_ptr": "*fp32", "pool_ptr": "*fp32",
        "scale": "fp32", "slot_stride": "i64", "depth_stride": "i64",
    }  # fmt: skip
    constexprs = {
        "H": 4, "HQ": 4, "HK": 4, "HV": 4, "HG": 4, "HO": 4, "K": K, "V": V, "BLOCK_K": K, "BLOCK_V": chosen.block_v,
        "DECAY": 3, "BONUS": False,
    }  # fmt: skip
    options = {"signature": signature, "constexprs": constexprs, "warps": chosen.warps}
    cost = compile_ahead("kernels.outer.step_triton", "outer_step_kernel", options)
    print(f"K={K} V={V}: {cost['registers']} registers, {cost['spills']} bytes spilled")
    assert cost["spills"] == 0
