"""What a decoding step does on a CPU in one call equals torch's many."""

import pytest
import torch
import torch.nn.functional as F

from kernels.gated import silu_product, silu_product_naive
from kernels.norm import rms_norm_step
from kernels.outer import outer
from kernels.outer.gla import gla_step
from models.layers import Rotary


@pytest.fixture(autouse=True)
def inference() -> object:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_silu_product(rows: int) -> None:
    x = 3 * torch.randn(rows, 2 * 37)
    torch.testing.assert_close(silu_product(x), silu_product_naive(x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [16, 8], ids=["whole heads", "half of each"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["apart", "side by side"])
def test_rotation(dim: int, interleaved: bool) -> None:
    heads, D, positions = 3, 16, torch.tensor([0, 1, 7, 3000])
    rotary, x = Rotary(dim, interleaved=interleaved), torch.randn(4, (heads + 1) * D)
    expected = x.view(4, heads + 1, D).clone()
    expected[:, :heads] = rotary(expected[:, :heads], positions)
    rotary.rotate_(x, positions, heads, D)
    torch.testing.assert_close(x.view(4, heads + 1, D), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gla(gated: bool) -> None:
    """Three segments, at two depths: one token, four, and one on the state that the others of its slot do not share."""
    H, K, V, T = 2, 8, 12, 6
    qkv, decay = torch.randn(T, H * (2 * K + V)), 4 * torch.randn(T, H * K)
    gate, weight = torch.randn(T, 5 + H * V), torch.rand(V) + 0.5
    index = torch.tensor([1, 2, 1]), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 5, 6])
    pools = [torch.randn(3, 2, H, K, V, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    q, k, v = qkv.split((H * K, H * K, H * V), -1)
    log_decay = F.logsigmoid(decay).view(T, H, K) / 16
    o = outer(q.view(T, H, K), k.view(T, H, K), v.view(T, H, V), log_decay, pools[0], *index, scale=0.3)
    expected = rms_norm_step(o, weight.numpy(), 1e-6).flatten(1)
    expected = expected * F.silu(gate[:, 5:]) if gated else expected
    at = 5 if gated else -1
    one_call = gla_step(
        qkv, decay, gate, at, weight.numpy(), pools[1], *index, normalizer=16, scale=0.3, eps=1e-6
    )
    torch.testing.assert_close(one_call, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pools[1], pools[0], rtol=1e-5, atol=1e-6)
