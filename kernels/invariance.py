"""Batch invariance: whether a row's numbers may depend, in their last bits, on how many rows are computed with it.

Where they must not, products of matrices have at least ROWS rows: from there on BLAS adds each row up in one order, and
below in others (measured with MKL: from 12 to 16 rows on, to the bit). It costs time at few rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.pool import inference

ROWS = 16
VECTORS = 64  # floats of one round of torch's vectorised loops


class Invariance:
    """A switch of the whole process."""

    on = False


def use_invariance(on: bool) -> None:
    Invariance.on = on


def wanted(x: Tensor) -> bool:
    """Whether it is switched on, and x [T, K] is what it is for: float32 on a CPU, without gradients."""
    return Invariance.on and x.dim() == 2 and inference(x)


def by_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function`, elementwise, of x [T, C], such as a number for each head. torch computes the last elements of an
    array, which fill no vector, in another way: of few channels each row gets vectors of its own."""
    missing = -x.shape[-1] % VECTORS
    if not missing or not wanted(x):
        return function(x)
    return function(F.pad(x, (0, missing)))[..., : x.shape[-1]]


def invariant_baddbmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """bias [H, 1, N], x [H, T, K], weight [H, K, N] -> x weight + bias [H, T, N]; each row the same whatever T is,
    where that is wanted."""
    rows = x.shape[1]
    if rows >= ROWS or not wanted(x[0]):
        return torch.baddbmm(bias, x, weight)
    return torch.baddbmm(bias, F.pad(x, (0, 0, 0, ROWS - rows)), weight)[:, :rows]


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N], each row the same whatever T is."""
    rows = x.shape[0]
    if rows >= ROWS:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, ROWS - rows)), weight, bias)[:rows]
