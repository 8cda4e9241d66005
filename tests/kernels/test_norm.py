"""The norm of few rows equals torch's."""

import pytest
import torch
import torch.nn.functional as F

from kernels.norm import MOST, few, rms_norm_step


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (4, 3, 20), (5, 768)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_equals_torch(shape: tuple[int, ...], size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = size * torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)
    expected = F.rms_norm(x, shape[-1:], weight, 1e-6)
    torch.testing.assert_close(rms_norm_step(x, weight.numpy(), 1e-6), expected, rtol=2e-6, atol=1e-7)


def test_what_it_may_take() -> None:
    x = torch.ones(2, 8)
    assert not few(x)  # it has no gradient
    with torch.no_grad():
        assert few(x)
        assert not few(x.bfloat16())
        assert not few(x.t())
        assert not few(torch.ones(MOST + 1))
