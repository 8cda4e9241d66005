"""Causal depthwise convolution, one token at a time:
y_t = b + sum_w weight[:, w] * x_{t - (W - 1 - w) * dilation}."""

import torch
from torch import Tensor


def conv_naive(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """One sequence: x [T, C], weight [C, W], state [(W - 1) * dilation, C] (the last inputs, oldest first) ->
    y [T, C], state."""
    out = torch.empty_like(x)
    for t in range(x.shape[0]):
        window = torch.cat([state, x[t : t + 1]])  # [(W - 1) * dilation + 1, C]
        out[t] = (window[::dilation].T * weight).sum(1)
        if bias is not None:
            out[t] += bias
        state = window[1:]
    return out, state
