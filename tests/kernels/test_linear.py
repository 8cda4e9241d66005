"""Projections of few rows: the kernel equals its plain twin, and eight bits are as near as they promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.linear import few_rows_linear, linear, linear_naive, pays, quantize


@given(
    rows=st.integers(1, 9),
    inner=st.integers(1, 70),
    outer=st.sampled_from([1, 2, 3, 4, 5, 63, 64, 67, 130]),
    bits=st.sampled_from([8, 32]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_kernel_equals_its_plain_twin(
    rows: int, inner: int, outer: int, bits: int, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inner), (outer, inner), (outer,))
    )
    stored, scale = quantize(weight) if bits == 8 else (weight, None)
    given_bias = bias if biased else None
    expected = linear_naive(x, stored, scale, given_bias)
    torch.testing.assert_close(
        few_rows_linear(x, stored, scale, given_bias), expected, rtol=1e-5, atol=1e-5 * inner
    )


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


@pytest.mark.parametrize("rows", [1, 3, 4, 32, 33])
def test_what_is_quickest_is_taken_and_gives_the_same(rows: int) -> None:
    weight, x = torch.randn(512, 512), torch.randn(rows, 512)
    with torch.no_grad():
        assert pays(x, weight) == (4 <= rows <= 32)
        torch.testing.assert_close(linear(x, weight, None), x @ weight.t(), rtol=1e-4, atol=1e-3)


def test_a_gradient_goes_through_torch() -> None:
    weight, x = torch.randn(512, 512, requires_grad=True), torch.randn(8, 512)
    assert not pays(x, weight)
    linear(x, weight, None).sum().backward()
    assert weight.grad is not None
