"""A projection with weights of eight bits: a scale for each output channel."""

import torch
from torch import Tensor


def linear_naive(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K], scale and bias [N] -> x (scale weight)^T + bias [T, N], float32."""
    y = x.float() @ weight.float().t()
    if scale is not None:
        y = y * scale
    return y if bias is None else y + bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> int8 [N, K] and scale [N], float32, with weight ~ scale int8.

    Symmetric, each output channel by its largest weight: no element is off by more than scale / 2, which is
    that largest one / 254.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    # A channel of zeros has no scale of its own; any will do.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale[:, None]).round().to(torch.int8), scale
