"""Cells: naive = scan = numba (both ways) = Triton, and torch.nn's RNN, GRU and LSTM."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kernels.cell as ops
from kernels.cell import KINDS, _on_cpu, _on_gpu, cell, cell_naive, cell_scan
from tests.kernels.compile_ahead import compile_ahead
from tests.kernels.pools import poisoned_pool, untouched

SLOTS, DEPTHS = torch.tensor([3, 5, 1, 8]), torch.tensor([0, 2, 1, 2])
KIND = pytest.mark.parametrize("kind", KINDS)


def _walk(*args):  # type: ignore[no-untyped-def]
    return _with(lambda *_: False, *args)


def _in_step(*args):  # type: ignore[no-untyped-def]
    return _with(lambda *_: True, *args)


def _from_walk_to_step(*args):  # type: ignore[no-untyped-def]
    return _with(lambda segments, *_: segments > 2, *args)


def _with(choice, *args):  # type: ignore[no-untyped-def]
    kept, ops._in_step = ops._in_step, choice
    try:
        return _on_cpu(*args)
    finally:
        ops._in_step = kept


def _wide(*args):  # type: ignore[no-untyped-def]
    kept, ops.WIDE, blocks = ops.WIDE, 0, dict(ops.WIDE_BLOCKS)
    least = 16 if torch.cuda.is_available() else 4  # of a product, on a tensor core
    ops.WIDE_BLOCKS.update(BLOCK_D=least, BLOCK_K=least)
    try:
        return _on_gpu(*args)
    finally:
        ops.WIDE = kept
        ops.WIDE_BLOCKS.update(blocks)


STEPS = pytest.mark.parametrize(
    "step",
    [_walk, _in_step, _from_walk_to_step, _on_gpu, _wide],
    ids=["walk", "in_step", "both", "triton", "triton_wide"],
)


def inputs(kind: str, lengths: list[int], H: int, D: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """wx, R, bias, states in the middle of their sequences, offsets."""
    torch.manual_seed(sum(lengths) + D)
    G, S = len(KINDS[kind].gates), len(KINDS[kind].states)
    wx, R, bias = (
        2 * torch.randn(sum(lengths), G, H, D),
        torch.randn(G, H, D, D) * D**-0.5,
        torch.randn(G, H, D),
    )
    states = torch.randn(len(lengths), S, H, D)
    if kind == "slstm":
        states[:, 2] = 1 + states[:, 2].abs()  # as the recurrence keeps it
    return wx, R, bias, states, torch.tensor([0, *lengths]).cumsum(0)


def naive(kind: str, wx: Tensor, R: Tensor, bias: Tensor | None, states: Tensor, offsets: Tensor) -> tuple:
    pairs = [cell_naive(kind, wx[a:b], R, bias, states[n]) for n, (a, b) in enumerate(pairwise(offsets))]
    return torch.cat([h for h, _ in pairs]), torch.stack([s for _, s in pairs])


@given(
    st.sampled_from(list(KINDS)),
    st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_scan_equals_naive(kind: str, lengths: list[int], H: int, D: int, biased: bool, fresh: bool) -> None:
    wx, R, bias, states, offsets = inputs(kind, lengths, H, D)
    states = torch.zeros_like(states) if fresh else states
    maybe = bias if biased else None
    expected = naive(kind, wx, R, maybe, states, offsets)
    torch.testing.assert_close(cell_scan(kind, wx, R, maybe, states, offsets), expected, rtol=1e-4, atol=1e-5)


@KIND
@STEPS
@pytest.mark.parametrize(
    ("lengths", "D"), [([1, 1, 1], 7), ([3, 1, 0, 6], 7), ([2, 4], 16)], ids=["decode", "mixed", "whole_tile"]
)
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
def test_steps_equal_naive(kind, step, lengths, D, biased) -> None:  # type: ignore[no-untyped-def]
    wx, R, bias, states, offsets = inputs(kind, lengths, 2, D)
    states[0] = 0.0  # one begins
    maybe = bias if biased else None
    expected, ends = naive(kind, wx, R, maybe, states, offsets)
    index = SLOTS[: len(lengths)], DEPTHS[: len(lengths)]
    pool = poisoned_pool(states, *index)
    got = step(wx, R, maybe, pool, *index, offsets, kind)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool[index], ends, rtol=1e-4, atol=1e-5)
    assert untouched(pool, *index)


@given(st.sampled_from(list(KINDS)), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_pieces_equal_the_whole(kind: str, pieces: list[int]) -> None:
    wx, R, bias, states, offsets = inputs(kind, [sum(pieces)], 2, 5)
    pool, index = torch.zeros(2, 1, *states.shape[1:]), (torch.tensor([1]), torch.tensor([0]))
    outs, at = [], 0
    for n in pieces:
        outs.append(cell(kind, wx[at : at + n], R, bias, pool, *index, torch.tensor([0, n])))
        at += n
    whole = cell(kind, wx, R, bias, None, *index, offsets)
    torch.testing.assert_close(torch.cat(outs), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("elman", torch.nn.RNN(6, 8)),
        ("elman_relu", torch.nn.RNN(6, 8, nonlinearity="relu")),
        ("gru", torch.nn.GRU(6, 8)),
        ("lstm", torch.nn.LSTM(6, 8)),
    ],
    ids=["elman", "elman_relu", "gru", "lstm"],
)
def test_equals_torch(kind: str, module: torch.nn.Module) -> None:
    """One head; torch's matrices are (to, from), its gates in the same order."""
    x, G, T = torch.randn(11, 6), len(KINDS[kind].gates), 11
    w = {name: p.detach() for name, p in module.named_parameters()}
    wx = (x @ w["weight_ih_l0"].T + w["bias_ih_l0"]).view(T, G, 1, 8)
    R = w["weight_hh_l0"].view(G, 1, 8, 8).transpose(-1, -2)
    zero = torch.zeros(len(KINDS[kind].states), 1, 8)
    got, end = cell_naive(kind, wx, R, w["bias_hh_l0"].view(G, 1, 8), zero)
    expected, last = module(x[:, None])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(end, last if isinstance(last, tuple) else (last,), strict=True):
        torch.testing.assert_close(mine, theirs[0], rtol=1e-5, atol=1e-5)


def test_slstm_equals_its_unstabilised_form() -> None:
    """c and n themselves, as equations 8 to 14 of the paper have them, in float64: the stabiliser changes
    nothing."""
    wx, R, bias, _, _ = inputs("slstm", [15], 2, 5)
    got, _ = cell_naive("slstm", wx, R, bias, torch.zeros(4, 2, 5))
    h = c = n = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(15):
        r = torch.einsum("hi,ghio->gho", h, R.double()) + bias
        i, f, z, o = wx[t].double() + r
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        torch.testing.assert_close(got[t].double(), h, rtol=1e-4, atol=1e-5)


@STEPS
def test_slstm_with_huge_gates_stays_finite(step) -> None:  # type: ignore[no-untyped-def]
    wx, R, bias, states, offsets = inputs("slstm", [6, 3], 2, 4)
    wx = 60 * wx
    expected, _ = naive("slstm", wx, R, bias, states, offsets)
    pool = poisoned_pool(states, SLOTS[:2], DEPTHS[:2])
    got = step(wx, R, bias, pool, SLOTS[:2], DEPTHS[:2], offsets, "slstm")
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@KIND
def test_training_gradient_equals_that_of_the_naive_form(kind: str) -> None:
    wx, R, bias, _states, offsets = inputs(kind, [9, 1, 4], 2, 3)
    leaves = [x.requires_grad_() for x in (wx, R, bias)]
    nowhere = torch.zeros(3, dtype=torch.int64)
    trained = cell(kind, *leaves, None, nowhere, nowhere, offsets)
    by_naive = torch.cat([_functional(kind, *leaves, a, b) for a, b in pairwise(offsets.tolist())])
    weight = torch.randn_like(trained)
    got = torch.autograd.grad((trained * weight).sum(), leaves)
    expected = torch.autograd.grad((by_naive * weight).sum(), leaves)
    torch.testing.assert_close(trained, by_naive, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def _functional(kind: str, wx: Tensor, R: Tensor, bias: Tensor, a: int, b: int) -> Tensor:
    """The naive form without writes in place."""
    from kernels.cell.naive import _step

    H, D = wx.shape[2:]
    state = [[torch.zeros(D)] * len(KINDS[kind].states) for _ in range(H)]
    outs = []
    for t in range(a, b):
        for j in range(H):
            r = torch.stack([state[j][0] @ R[g, j] for g in range(R.shape[0])]) + bias[:, j]
            state[j] = _step(kind, wx[t, :, j], r, torch.stack(state[j]))
        outs.append(torch.stack([s[0] for s in state]))
    return torch.stack(outs)


def test_many_segments_go_from_step_to_walk() -> None:
    """The choice that is made outside of tests, with enough segments and width for both."""
    lengths = [3, 9, 1, 1, 2, 9, 4, 1, 7]
    wx, R, bias, states, offsets = inputs("lstm", lengths, 1, 128)
    pool, index = torch.zeros(10, 1, 2, 1, 128), (torch.arange(1, 10), torch.zeros(9, dtype=torch.int64))
    pool[index] = states
    got = cell("lstm", wx, R, bias, pool, *index, offsets)
    expected, ends = cell_scan("lstm", wx, R, bias, states, offsets)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool[index], ends, rtol=1e-4, atol=1e-5)


@STEPS
def test_padded_rows_leave_live_slots_alone(step) -> None:  # type: ignore[no-untyped-def]
    wx, R, bias, states, offsets = inputs("lstm", [1, 1, 1], 2, 4)
    expected, ends = naive("lstm", wx, R, bias, states, offsets)
    pool = torch.zeros(4, 1, *states.shape[1:])
    pool[2, 0] = states[0]
    got = step(wx, R, bias, pool, torch.tensor([2, 0, 0]), torch.tensor([0, 0, 0]), offsets, "lstm")
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[2, 0], ends[0], rtol=1e-5, atol=1e-5)
    assert not pool[1].any() and not pool[3].any()


@STEPS
def test_slot_index_arithmetic_is_64_bit(step) -> None:  # type: ignore[no-untyped-def]
    """A slot whose offset passes 2^31 elements. The pool is virtual memory; only one slot of it is
    touched."""
    wx, R, bias, states, offsets = inputs("lstm", [1], 8, 16)
    slot = 2**31 // states[0].numel() + 3
    pool = torch.empty(slot + 1, 1, *states.shape[1:])
    pool[slot, 0] = states[0]
    got = step(wx, R, bias, pool, torch.tensor([slot]), torch.tensor([0]), offsets, "lstm")
    expected, ends = cell_scan("lstm", wx, R, bias, states, offsets)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool[slot, 0], ends[0], rtol=1e-4, atol=1e-5)


def test_contradictions_are_refused() -> None:
    wx, R, bias, _states, offsets = inputs("gru", [1], 2, 4)
    index = torch.tensor([1]), torch.tensor([0]), offsets
    with pytest.raises(ValueError, match="kind: 'mgu' is none of elman"):
        cell("mgu", wx, R, bias, None, *index)
    with pytest.raises(ValueError, match="lstm has 4 gates, got 3 and 3"):
        cell("lstm", wx, R, bias, None, *index)
    with pytest.raises(ValueError, match="pool: gru has 1 states, got 2"):
        cell("gru", wx, R, bias, torch.zeros(2, 1, 2, 2, 4), *index)


@pytest.mark.parametrize("single", [False, True], ids=["walk", "single"])
@pytest.mark.parametrize(
    ("kind", "D"), [("slstm", 64), ("gru", 64), ("lstm", 16), ("slstm", 256), ("lstm", 1024)]
)
def test_compiles_ahead_for_sm_90_without_spills(kind: str, D: int, single: bool) -> None:
    if single and D <= ops.WIDE:
        pytest.skip("one kernel for both")
    signature = {
        **dict.fromkeys(("wx_ptr", "R_ptr", "bias_ptr", "out_ptr"), "*fp32"),
        **dict.fromkeys(("slots_ptr", "depths_ptr", "offsets_ptr"), "*i64"),
        "pool_ptr": "*fp32", "N": "i32", "slot_stride": "i64", "depth_stride": "i64",
    }  # fmt: skip
    wide = D > ops.WIDE
    constexprs = {
        "H": 4, "D": D, "G": len(KINDS[kind].gates), "BLOCK_N": 16, "KIND": KINDS[kind].code, "BIAS": True,
        **({**ops.WIDE_BLOCKS, "SINGLE": single} if wide else {"BLOCK_D": D}),
    }  # fmt: skip
    options = {
        "signature": signature,
        "constexprs": constexprs,
        "warps": ops.WARPS // 2 if single else ops.WARPS,
    }
    kernel = "cell_wide_kernel" if wide else "cell_step_kernel"
    cost = compile_ahead("kernels.cell.step_triton", kernel, options)
    print(f"{kind} D={D}: {cost['registers']} registers, {cost['spills']} spilled, {cost['shared']} shared")
    assert cost["spills"] == 0 and cost["shared"] <= 227 * 1024
