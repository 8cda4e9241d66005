"""Projections in blocks: the kernel equals its plain twin, rows do not depend on their neighbours, and eight bits are
as near as they promise."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.invariance import use_invariance
from kernels.linear import Blocked, linear, linear_naive, narrowed, quantize
from kernels.linear.blocks_numba import (
    ALONE,
    CHANNELS,
    FEATURES,
    LANES,
    MOST_ROWS,
    NONE,
    Matrix,
    from_blocks,
    most,
    project,
    rounded,
    sums_of,
    to_blocks,
)

SIZES = st.sampled_from([1, 2, 3, 15, 16, 63, 64, 67, 130])
SHAPES = given(
    rows=st.integers(1, 14),
    inner=st.integers(1, 70),
    outer=SIZES,
    biased=st.booleans(),
    seed=st.integers(0, 99),
)


def case(rows: int, inner: int, outer: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, inner), (outer, inner), (outer,))
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x, weight, bias


@torch.no_grad()
@SHAPES
def test_floats_equal_the_plain_twin(rows: int, inner: int, outer: int, biased: bool, seed: int) -> None:
    x, weight, bias = case(rows, inner, outer, seed)
    chosen = bias if biased else None
    torch.testing.assert_close(
        Blocked(weight, None, chosen)(x), linear_naive(x, weight, None, chosen), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@SHAPES
def test_eight_bits_equal_the_plain_twin(rows: int, inner: int, outer: int, biased: bool, seed: int) -> None:
    x, weight, bias = case(rows, inner, outer, seed)
    stored, scale = quantize(weight)
    whole, step = rounded(x.numpy())
    inputs = torch.from_numpy(whole[:, :inner].astype(np.float32)) * torch.from_numpy(step)[:, None]
    torch.testing.assert_close(inputs, x, rtol=0, atol=float(x.abs().max()) / most(inner))
    expected = linear_naive(inputs, stored, scale, bias if biased else None)
    made = Blocked(stored, scale, bias if biased else None)(x)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 32])
@given(rows=st.integers(2, 300), inner=st.integers(1, 400), outer=SIZES, seed=st.integers(0, 99))
def test_a_row_does_not_see_its_neighbours(bits: int, rows: int, inner: int, outer: int, seed: int) -> None:
    x, weight, _ = case(rows, inner, outer, seed)
    stored, scale = quantize(weight) if bits == 8 else (weight, None)
    use_invariance(True)
    blocked = Blocked(stored, scale)
    assert blocked.takes(x)
    together = blocked(x)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(blocked(x[row : row + 1]), together[row : row + 1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(rows=st.integers(1, 14), inner=st.integers(1, 70), outer=SIZES, size=st.sampled_from([1e-6, 1.0, 1e3]))
def test_sixteen_bits_say_what_32_do(
    dtype: torch.dtype, rows: int, inner: int, outer: int, size: float
) -> None:
    x, weight, bias = case(rows, inner, outer, inner)
    weight = (size * weight).to(dtype).float()
    blocked = Blocked(weight, None, bias)
    assert blocked.matrix.blocks.itemsize == 2
    out = torch.empty(rows, outer).numpy()
    project(x.numpy(), Matrix(to_blocks(weight.numpy()), NONE, bias.numpy()), out)
    assert torch.equal(blocked(x), torch.from_numpy(out))


@pytest.mark.parametrize("rows", [1, 65, 300])
def test_one_weight_of_32_bits_is_enough_to_keep_all(rows: int) -> None:
    weight = torch.ones(rows, 3)
    half = np.int16 if FEATURES.get("f16c") else np.uint16
    assert narrowed(weight)[0].dtype == half
    weight[-1, -1] = 2**-40  # no power of two makes both numbers of float16
    assert narrowed(weight)[0].dtype == np.uint16
    weight[0, 0] = 1 + 2**-10
    assert narrowed(weight)[0].dtype == np.float32
    for other in (1 + 2**-20, 1e5 + 1, 1e-30, 1.0):
        weight[-1, -1] = other
        assert narrowed(weight)[0].dtype == (half if other == 1 and half == np.int16 else np.float32)


@given(outer=SIZES, inner=st.integers(1, 9), bits=st.sampled_from([8, 32]))
def test_blocks_hold_the_whole_matrix(outer: int, inner: int, bits: int) -> None:
    weight = np.arange(outer * inner).reshape(outer, inner).astype(np.int8 if bits == 8 else np.float32)
    assert np.array_equal(from_blocks(to_blocks(weight), outer, inner), weight)


@torch.no_grad()
@pytest.mark.parametrize("inner", [7, 700, 70_000])
def test_the_largest_products_do_not_overflow(inner: int) -> None:
    x, stored = torch.full((1, inner), -3.0), torch.full((2, inner), 127, dtype=torch.int8)
    made = Blocked(stored, torch.tensor([1.0, 2.0]))(x)
    torch.testing.assert_close(made, torch.tensor([[1.0, 2.0]]) * -3 * 127 * inner, rtol=1e-4, atol=0)


@torch.no_grad()
def test_a_row_of_zeros_is_zero() -> None:
    stored, scale = quantize(torch.randn(5, 9))
    assert Blocked(stored, scale)(torch.zeros(1, 9)).eq(0).all()


@pytest.mark.parametrize("rows", [1, MOST_ROWS])
def test_processors_without_the_instruction_say_the_same(rows: int) -> None:
    channels = ALONE if rows == 1 else CHANNELS
    sums = sums_of(rows, instruction=False, channels=channels)

    @numba.njit
    def run(w, x, inner, out):  # type: ignore[no-untyped-def]
        sums(w, 0, 0, 0, x, 0, 2 * inner, inner, out)

    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (channels, 22)).astype(np.int8)
    x = generator.integers(-32767, 32768, (rows, 22)).astype(np.int16) // 20
    out = np.empty(rows * channels, np.float32)
    run(to_blocks(weight), x.reshape(-1), 11, out)
    exact = x.astype(np.int64) @ weight.T.astype(np.int64)
    assert channels >= LANES * 2
    assert np.array_equal(out.reshape(rows, channels), exact.astype(np.float32))


@given(
    channels=st.integers(1, 9),
    inner=st.integers(1, 40),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_eight_bits_are_off_by_half_a_step_at_most(channels: int, inner: int, size: float, seed: int) -> None:
    weight = size * torch.randn(channels, inner, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    stored, scale = quantize(weight)
    off = (stored * scale[:, None] - weight).abs()
    assert (off <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all()


def test_many_rows_go_to_blas_where_nobody_compares_them() -> None:
    weight = torch.randn(8, 8)
    blocked, few, many = Blocked(weight), torch.randn(64, 8), torch.randn(65, 8)
    with torch.no_grad():
        assert blocked.takes(few) and not blocked.takes(many)
        use_invariance(True)
        assert blocked.takes(many)
    assert not blocked.takes(few)  # a gradient is wanted


def test_a_gradient_goes_through_torch() -> None:
    weight, x = torch.randn(512, 512, requires_grad=True), torch.randn(8, 512)
    linear(x, weight, None).sum().backward()
    assert weight.grad is not None
