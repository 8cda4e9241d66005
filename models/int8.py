"""Weights of eight bits for decoding on CPUs, where reading the weights is what a step takes its time for.

Each output channel of a projection has a scale; activations stay as they are. A weight moves by at most 1/254 of the
largest of its channel. That changes what a model computes, so it is never done unasked.
"""

from typing import cast

import torch
from torch import Tensor, nn

from kernels.linear import NONE, Matrix, few_rows_linear, linear, quantize
from kernels.pool import as_float32

ROWS = 32  # Above, a step is bound by its multiplications, and eight bits save nothing.
LEAST = 1 << 16  # Weights of a projection that is worth it: smaller ones stay in a core's cache.


class Int8:
    """A matrix [N, K] of eight bits."""

    def __init__(self, weight: Tensor):
        """`weight` becomes what its eight bits say, so that a batch of any size sees the same model."""
        self.weight, self.scale = quantize(weight)
        weight.copy_(self.weight * self.scale[:, None])

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K], the float copy [N, K] for many rows, bias [N] -> [T, N]."""
        if x.dim() != 2 or x.shape[0] > ROWS or x.is_cuda or torch.is_grad_enabled():
            return linear(x, weight, bias)
        return cast("Tensor", few_rows_linear(x, self.weight, self.scale, bias))


def matrix(module: nn.Linear) -> Matrix:
    """A projection for kernels that contain it."""
    int8: Int8 | None = getattr(module, "int8", None)
    weight = as_float32(module.weight.detach()) if int8 is None else int8.weight.numpy()
    scale = NONE if int8 is None else int8.scale.numpy()
    return Matrix(weight, scale, NONE if module.bias is None else as_float32(module.bias.detach()))


@torch.no_grad()
def to_int8(model: nn.Module, least: int | None = None) -> None:
    """Give eight bits to every projection of at least so many weights, LEAST if not given: all that have an `int8` to
    fill, and a head that is the embeddings."""
    least = LEAST if least is None else least
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "int8") and isinstance(weight, Tensor) and weight.numel() >= least:
            object.__setattr__(module, "int8", Int8(weight))
    if hasattr(model, "tied_int8") and getattr(model, "lm_head", None) is None:
        weight = cast("nn.Embedding", model.embeddings).weight
        if weight.numel() >= least:
            object.__setattr__(model, "tied_int8", Int8(weight))
