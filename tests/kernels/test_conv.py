"""Causal convolutions, short and dilated: naive = scan = numba = Triton, and torch's conv1d."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kernels.conv as ops
import kernels.conv.ring as rings
from kernels.conv import _on_cpu, _on_gpu, conv, conv_naive, conv_scan, conv_taps, taps_scan
from tests.kernels.compile_ahead import compile_ahead
from tests.kernels.pools import poisoned_pool, untouched

SLOTS, DEPTHS = torch.tensor([3, 5, 1, 8]), torch.tensor([0, 2, 1, 2])
LENGTHS = pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 0, 25]], ids=["decode", "mixed"])
SHORT = pytest.mark.parametrize("step", [_on_cpu, _on_gpu], ids=["numba", "triton"])
RING = pytest.mark.parametrize("step", [rings._on_cpu, rings._on_gpu], ids=["numba", "triton"])


def inputs(
    lengths: list[int], C: int, W: int, dilation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, states (oldest input first), offsets."""
    torch.manual_seed(sum(lengths) + C)
    states = torch.randn(len(lengths), (W - 1) * dilation, C)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(sum(lengths), C), torch.randn(C, W), torch.randn(C), states, offsets


def naive(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, offsets: Tensor, dilation: int
) -> Any:
    pairs = [
        conv_naive(x[a:b], weight, bias, states[n], dilation) for n, (a, b) in enumerate(pairwise(offsets))
    ]  # fmt: skip
    return torch.cat([y for y, _ in pairs]), torch.stack([s for _, s in pairs])


def rolled(states: Tensor, cursors: Tensor) -> Tensor:
    """States [N, R, C], oldest first, as rings whose oldest input lies at the cursor."""
    return torch.stack([s.roll(int(c), 0) for s, c in zip(states, cursors, strict=True)])


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any)


@given(lengths, st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_scan_equals_naive(lengths: list[int], C: int, W: int, dilation: int, biased: bool) -> None:
    x, weight, bias, states, offsets = inputs(lengths, C, W, dilation)
    maybe = bias if biased else None
    expected = naive(x, weight, maybe, states, offsets, dilation)
    torch.testing.assert_close(
        conv_scan(x, weight, maybe, states, offsets, dilation), expected, rtol=1e-5, atol=1e-5
    )
    seen, ends = taps_scan(x, states, offsets, W, dilation)
    y = torch.einsum("twc,cw->tc", seen, weight) + (bias if biased else 0)
    torch.testing.assert_close((y, ends), expected, rtol=1e-5, atol=1e-5)


@SHORT
@LENGTHS
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
def test_short_steps_equal_naive(step, lengths, W, silu, biased) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, states, offsets = inputs(lengths, 6, W, 1)
    maybe = bias if biased else None
    expected, ends = naive(x, weight, maybe, states, offsets, 1)
    index = SLOTS[: len(lengths)], DEPTHS[: len(lengths)]
    pool = poisoned_pool(states, *index)
    got = step(x, weight, maybe, pool, *index, offsets, silu)
    torch.testing.assert_close(got, F.silu(expected) if silu else expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[index], ends, rtol=0, atol=0)
    assert untouched(pool, *index)


@RING
@LENGTHS
@pytest.mark.parametrize(("W", "dilation"), [(2, 1), (3, 4), (2, 8), (5, 3)])
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
def test_dilated_steps_equal_naive(step, lengths, W, dilation, silu, biased, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ops, "conv_ring", step)
    x, weight, bias, states, offsets = inputs(lengths, 6, W, dilation)
    maybe = bias if biased else None
    expected, ends = naive(x, weight, maybe, states, offsets, dilation)
    index = SLOTS[: len(lengths)], DEPTHS[: len(lengths)]
    R = states.shape[1]
    cursors = torch.arange(len(lengths))[:, None] * 2 % R
    pool, cursor = poisoned_pool(rolled(states, cursors), *index), poisoned_pool(cursors.float(), *index)
    got = conv(x, weight, maybe, pool, *index, offsets, silu=silu, dilation=dilation, cursor_pool=cursor)
    torch.testing.assert_close(got, F.silu(expected) if silu else expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cursor[index], ((cursors + offsets.diff()[:, None]) % R).float())
    torch.testing.assert_close(pool[index], rolled(ends, cursor[index]), rtol=0, atol=0)
    assert untouched(pool, *index) and untouched(cursor, *index)


@RING
@LENGTHS
def test_taps_steps_equal_the_scan(step, lengths, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ops, "conv_ring", step)
    x, _, _, states, offsets = inputs(lengths, 6, 3, 4)
    index = SLOTS[: len(lengths)], DEPTHS[: len(lengths)]
    pool, cursor = poisoned_pool(states, *index), poisoned_pool(torch.zeros(len(lengths), 1), *index)
    got = conv_taps(x, pool, *index, offsets, width=3, dilation=4, cursor_pool=cursor)
    expected, ends = taps_scan(x, states, offsets, 3, 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(pool[index], rolled(ends, cursor[index]), rtol=0, atol=0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.sampled_from([(4, 1), (3, 5), (2, 16)]))
def test_pieces_equal_torchs_convolution_of_the_whole(pieces: list[int], shape: tuple[int, int]) -> None:
    W, dilation = shape
    x, weight, bias, states, _ = inputs([sum(pieces)], 7, W, dilation)
    full = torch.nn.Conv1d(7, 5, W, dilation=dilation)
    before = torch.cat([torch.zeros_like(states[0]), x]).T
    pool, cursor = torch.zeros(2, 1, *states.shape[1:]), torch.zeros(2, 1, 1)
    taps_pool, taps_cursor = torch.zeros_like(pool), torch.zeros_like(cursor)
    index = torch.tensor([1]), torch.tensor([0])
    depthwise, dense, at = [], [], 0
    for n in pieces:
        part, offsets = x[at : at + n], torch.tensor([0, n])
        ring: Any = {"dilation": dilation, "cursor_pool": cursor if dilation > 1 else None}
        depthwise.append(conv(part, weight, bias, pool, *index, offsets, silu=False, **ring))
        seen = conv_taps(
            part, taps_pool, *index, offsets, width=W, dilation=dilation, cursor_pool=taps_cursor
        )  # fmt: skip
        dense.append(torch.einsum("twc,ocw->to", seen, full.weight) + full.bias)
        at += n
    expected = F.conv1d(before, weight[:, None], bias, dilation=dilation, groups=7).T
    torch.testing.assert_close(torch.cat(depthwise), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(dense), full(before).T, rtol=1e-5, atol=1e-5)


def test_training_is_differentiable_and_begins_with_zeros() -> None:
    x, weight, bias, states, offsets = inputs([9, 1, 30], 4, 3, 4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    index = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), offsets
    y = conv(*leaves, None, *index, silu=True, dilation=4)
    expected = F.silu(naive(*leaves, torch.zeros_like(states), offsets, 4)[0])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(
        got, torch.autograd.grad(expected.square().sum(), leaves), rtol=1e-4, atol=1e-4
    )


@RING
def test_padded_rows_leave_live_slots_alone(step) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, states, offsets = inputs([1, 1, 1], 4, 3, 2)
    expected, ends = naive(x, weight, bias, states, offsets, 2)
    slots, depths = torch.tensor([2, 0, 0]), torch.tensor([0, 0, 0])
    pool, cursor = torch.zeros(4, 1, *states.shape[1:]), torch.zeros(4, 1, 1)
    pool[2, 0] = states[0]
    got = step(x, weight, bias, pool, cursor, slots, depths, offsets, 2, False)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[2, 0], ends[0].roll(1, 0))
    assert not pool[1].any() and not pool[3].any()


@RING
def test_slot_index_arithmetic_is_64_bit(step) -> None:  # type: ignore[no-untyped-def]
    """A slot whose offset passes 2^31 elements. The pool is virtual memory; only two slots of it are
    touched."""
    x, weight, bias, states, offsets = inputs([1], 512, 3, 32)
    slot = 2**31 // states[0].numel() + 3
    pool, cursor = torch.empty(slot + 1, 1, *states.shape[1:]), torch.zeros(slot + 1, 1, 1)
    pool[slot, 0] = states[0]
    got = step(x, weight, bias, pool, cursor, torch.tensor([slot]), torch.tensor([0]), offsets, 32, False)
    expected, ends = naive(x, weight, bias, states, offsets, 32)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[slot, 0], ends[0].roll(1, 0))


def test_contradictions_are_refused() -> None:
    x, weight, bias, states, offsets = inputs([1], 4, 3, 2)
    index = torch.tensor([1]), torch.tensor([0]), offsets
    pool = torch.zeros(2, 1, *states.shape[1:])
    with pytest.raises(ValueError, match="cursor_pool: needed with a dilation of 2"):
        conv(x, weight, bias, pool, *index, silu=False, dilation=2)
    with pytest.raises(ValueError, match="pool: 4 inputs, 3 taps and dilation 3 need 6"):
        conv(x, weight, bias, pool, *index, silu=False, dilation=3, cursor_pool=torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match="width: 1"):
        conv_taps(x, None, *index, width=1)
    with pytest.raises(ValueError, match="cursor_pool: needed"):
        conv_taps(x, pool, *index, width=3, dilation=2)


@pytest.mark.parametrize("kernel", ["conv_step_kernel", "ring_read_kernel", "ring_append_kernel"])
@pytest.mark.parametrize(("W", "dilation"), [(4, 1), (20, 2)], ids=["short", "fsmn"])
def test_compiles_ahead_for_sm_90_without_spills(kernel: str, W: int, dilation: int) -> None:
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16")
    indices = dict.fromkeys(("slots_ptr", "depths_ptr", "offsets_ptr", "cursors_ptr"), "*i64")
    strides = dict.fromkeys(
        ("slot_stride", "depth_stride", "cursor_slot_stride", "cursor_depth_stride"), "i64"
    )
    names: Any = {"pool_ptr": "*fp32", "cursor_ptr": "*fp32", "C": "i32", **pointers, **indices, **strides}
    tile = {"BLOCK_C": 256, "W": W, "BLOCK_W": 1 << (W - 1).bit_length(), "BIAS": True, "SILU": True}
    own: dict[str, dict[str, Any]] = {
        "conv_step_kernel": tile,
        "ring_read_kernel": {**tile, "DILATION": dilation, "TAPS": False},
        "ring_append_kernel": {"R": (W - 1) * dilation, "BLOCK_C": 256},
    }
    options = {"signature": names, "constexprs": own[kernel], "warps": 4}
    cost = compile_ahead("kernels.conv.step_triton", kernel, options)
    print(f"{kernel} W={W}: {cost['registers']} registers, {cost['spills']} bytes spilled")
    assert cost["spills"] == 0
