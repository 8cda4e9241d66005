"""pLSTM on a sequence: naive = scan = numba = Triton, and its scalar form."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.outer import outer_naive
from kernels.outer.plstm import _on_cpu, _on_gpu, block_v, plstm, plstm_naive
from tests.kernels.compile_ahead import compile_ahead
from tests.kernels.pools import poisoned_pool, untouched

Sizes = tuple[int, int, int, int, int]  # A queries, M keys, N values, J copies, Y outputs of a head


def inputs(lengths: list[int], sizes: Sizes, H: int = 2, K: int = 5, V: int = 3) -> tuple:
    """(q, k, v, source, transition, mark, direct), states, offsets."""
    torch.manual_seed(sum(lengths) + sum(sizes))
    T, (A, M, N, J, Y) = sum(lengths), sizes
    packed = (
        torch.randn(T, H, A, K), torch.randn(T, H, M, K), torch.randn(T, H, N, V), torch.randn(T, H, J, M, N),
        torch.linalg.qr(torch.randn(T, H, J, J)).Q, torch.randn(T, H, Y, A, J), torch.randn(T, H, Y, A, M, N),
    )  # fmt: skip
    return packed, torch.randn(len(lengths), H, J, K, V), torch.tensor([0, *lengths]).cumsum(0)


def naive(packed: tuple[Tensor, ...], states: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [
        plstm_naive(*(x[a:b] for x in packed), states[n], 0.4) for n, (a, b) in enumerate(pairwise(offsets))
    ]  # fmt: skip
    return torch.cat([y for y, _ in pairs]), torch.stack([c for _, c in pairs])


SIZES = [(1, 1, 1, 1, 1), (1, 1, 4, 4, 4), (2, 3, 2, 3, 1)]
lengths = st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any)


@given(lengths, st.sampled_from(SIZES))
def test_training_equals_naive_from_zero(lengths: list[int], sizes: Sizes) -> None:
    packed, states, offsets = inputs(lengths, sizes)
    nowhere = torch.zeros(len(lengths), dtype=torch.int64)
    got = plstm(*packed, None, nowhere, nowhere, offsets, scale=0.4)
    torch.testing.assert_close(got, naive(packed, torch.zeros_like(states), offsets)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [_on_cpu, _on_gpu], ids=["numba", "triton"])
@pytest.mark.parametrize("sizes", SIZES, ids=["scalar", "default", "odd"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 0, 6]], ids=["decode", "mixed"])
def test_steps_equal_naive(step, sizes, lengths, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("kernels.outer.plstm.plstm_step", step)
    packed, states, offsets = inputs(lengths, sizes)
    index = torch.tensor([3, 5, 1, 8])[: len(lengths)], torch.tensor([0, 2, 1, 2])[: len(lengths)]
    pool = poisoned_pool(states, *index)
    expected, ends = naive(packed, states, offsets)
    got = plstm(*packed, pool, *index, offsets, scale=0.4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool[index], ends, rtol=1e-4, atol=1e-4)
    assert untouched(pool, *index)


def test_the_scalar_form_is_an_outer_product_state() -> None:
    """y = scale q (M C_{t-1} + D k v^T), C = T C + S k v^T: with T = e^g, M = 1 and D = u S, the bonus
    form."""
    (q, k, v, source, *_), states, offsets = inputs([9], (1, 1, 1, 1, 1))
    g, u = -torch.rand(9, 2), torch.randn(2)
    ones = torch.ones(9, 2, 1, 1, 1)
    gates = source, g.exp().view(9, 2, 1, 1), ones, (source * u.view(1, 2, 1, 1, 1))[..., None]
    got = plstm(q, k, v, *gates, None, torch.zeros(1).long(), torch.zeros(1).long(), offsets, scale=0.4)
    expected, _ = outer_naive(
        q[:, :, 0], k[:, :, 0] * source[..., 0, 0], v[:, :, 0], g, torch.zeros_like(states[0, :, 0]), 0.4,
        bonus=u[:, None].expand(2, 5),
    )  # fmt: skip
    torch.testing.assert_close(got[:, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_training_is_differentiable_in_everything() -> None:
    packed, _, offsets = inputs([5, 2], (1, 1, 2, 2, 2))
    leaves = [x.double().requires_grad_() for x in packed]
    nowhere = torch.zeros(2, dtype=torch.int64)

    def run(*gates: Tensor) -> Tensor:
        return plstm(*gates, None, nowhere, nowhere, offsets, scale=0.4)

    gradients = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    for x, gradient in zip(leaves, gradients, strict=True):
        assert gradient.isfinite().all() and (gradient != 0).any()
        step = torch.randn_like(x) * 1e-3
        moved = [y + step if y is x else y for y in leaves]
        back = [y - step if y is x else y for y in leaves]
        slope = (run(*moved).square().sum() - run(*back).square().sum()) / 2
        torch.testing.assert_close(slope, (gradient * step).sum(), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("J", "K", "V"), [(4, 64, 16), (4, 192, 48)])
def test_compiles_ahead_for_sm_90_without_spills(J: int, K: int, V: int) -> None:
    signature = {
        **dict.fromkeys(("p_ptr", "k_ptr", "w_ptr", "transition_ptr"), "*fp32"),
        **dict.fromkeys(("slots_ptr", "depths_ptr", "offsets_ptr"), "*i64"),
        "pool_ptr": "*fp32", "out_ptr": "*fp32", "slot_stride": "i64", "depth_stride": "i64",
    }  # fmt: skip
    constexprs = {
        "H": 4, "Y": 4, "J": J, "M": 1, "K": K, "V": V, "BLOCK_J": J, "BLOCK_K": 1 << (K - 1).bit_length(),
        "BLOCK_V": block_v(J, K, V),
    }  # fmt: skip
    options = {"signature": signature, "constexprs": constexprs, "warps": 4}
    cost = compile_ahead("kernels.outer.plstm_triton", "plstm_step_kernel", options)
    print(
        f"J={J} K={K}: {cost['registers']} registers, {cost['spills']} bytes spilled, {cost['shared']} shared"
    )
    assert cost["spills"] == 0
