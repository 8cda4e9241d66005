"""Batch invariance: whether a row's numbers may depend, in their last bits, on how many rows are computed with it.

Where they must not, products of matrices have at least ROWS rows: from there on BLAS adds each row up in one order, and
below in others (measured with MKL: from 12 to 16 rows on, to the bit). It costs time at few rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16


class Invariance:
    """A switch of the whole process."""

    on = False


def use_invariance(on: bool) -> None:
    Invariance.on = on


def wanted(x: Tensor) -> bool:
    """Whether it is switched on, and x [T, K] is what it is for: float32 on a CPU, without gradients."""
    return (
        Invariance.on
        and x.dim() == 2
        and x.dtype is torch.float32
        and not x.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N], each row the same whatever T is."""
    rows = x.shape[0]
    if rows >= ROWS:
        return F.linear(x, weight, bias)
    padded = x.new_zeros(ROWS, x.shape[1])
    padded[:rows] = x
    return F.linear(padded, weight, bias)[:rows]
