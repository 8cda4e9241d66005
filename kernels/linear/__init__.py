"""Projections of the few rows of a decoding step, on CPUs: with float32 weights, or weights of eight bits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.invariance import invariant_linear, wanted
from kernels.library import define
from kernels.linear.naive import linear_naive, quantize
from kernels.linear.step_numba import NONE, Matrix, linear_step_numba
from kernels.pool import as_float32

__all__ = ["NONE", "ROWS", "Matrix", "few_rows_linear", "linear", "linear_naive", "pays", "quantize"]

ROWS = range(4, 33)  # Of fewer, and of more, BLAS is as quick.
LEAST = 1 << 18  # Smaller matrices stay in a core's cache, where it is quicker.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> x weight^T + bias [T, N], by whatever is quickest."""
    if wanted(x):
        return invariant_linear(x, weight, bias)
    return few_rows_linear(x, weight, None, bias) if pays(x, weight) else F.linear(x, weight, bias)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows_linear` is quicker than BLAS, and may be taken: it has no gradient."""
    return (
        weight.numel() >= LEAST
        and x.dim() == 2
        and x.shape[0] in ROWS
        and x.dtype == weight.dtype == torch.float32
        and not x.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _on_cpu(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """As `linear_naive`, in the type of x."""
    out = torch.empty(x.shape[0], weight.shape[0])
    linear_step_numba(
        as_float32(x),
        weight.numpy(),
        NONE if scale is None else scale.numpy(),
        NONE if bias is None else as_float32(bias),
        out.numpy(),
    )
    return out.to(x.dtype)


def _on_gpu(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return linear_naive(x, weight, scale, bias).to(x.dtype)


def _shape_only(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


few_rows_linear = define(
    "few_rows_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
