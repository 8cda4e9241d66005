"""Weights of eight bits, on CPUs, where reading the weights is what a decoding step takes its time for.

Each output channel of a projection has a scale, and a weight moves by at most 1/254 of the largest of its channel.
Inputs are rounded too, to some fourteen bits (see kernels/linear), a hundred times finer. That changes what a model
computes, so it is never done unasked.
"""

from typing import cast

import torch
from torch import Tensor, nn

from kernels.linear import Blocked, quantize

LEAST = 1 << 16  # Weights of a projection that is worth it: smaller ones stay in a core's cache.


def _eight(weight: Tensor, bias: Tensor | None) -> Blocked:
    """`weight` itself becomes what its eight bits say: whoever looks at it sees the same model."""
    rounded, scale = quantize(weight)
    weight.copy_(rounded * scale[:, None])
    return Blocked(rounded, scale, bias)


@torch.no_grad()
def to_int8(model: nn.Module, least: int | None = None) -> None:
    """Give eight bits to every projection of at least so many weights, LEAST if not given, and to a head that is the
    embeddings."""
    least = LEAST if least is None else least
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "blocked") and isinstance(weight, Tensor) and weight.numel() >= least:
            object.__setattr__(module, "blocked", _eight(weight, getattr(module, "bias", None)))
    if hasattr(model, "tied_head") and getattr(model, "lm_head", None) is None:
        weight = cast("nn.Embedding", model.embeddings).weight
        if weight.numel() >= least:
            object.__setattr__(model, "tied_head", _eight(weight, None))
