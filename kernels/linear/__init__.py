"""Projections on CPUs: with float32 weights, sixteen bits wide where that loses nothing, or weights of eight bits, in
blocks of channels (see blocks_numba)."""

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bound import Bound
from kernels.invariance import Invariance, invariant_linear, wanted
from kernels.library import define
from kernels.linear.blocks_numba import FEATURES, NONE, Blocks, Floats, Matrix, project_any, to_blocks
from kernels.linear.naive import linear_naive, quantize
from kernels.pool import as_float32, inference, tensor_of

__all__ = ["Blocked", "Matrix", "few_rows", "linear", "linear_naive", "narrowed", "quantize"]

ROWS = 64  # Of more, BLAS is quicker with float32 weights; it has no batch invariance to keep.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> x weight^T + bias [T, N], by BLAS."""
    return invariant_linear(x, weight, bias) if wanted(x) else F.linear(x, weight, bias)


def narrowed(weight: Tensor) -> tuple[Blocks, Floats]:
    """weight [N, K], float32 or int8, as an array, and what it is to be multiplied by, [1] or [0] for nothing. Of
    float32 weights that are numbers of bfloat16 or of float16, as checkpoints in these types have them, sixteen bits.
    Those of float16 (int16 in the array) take half the instructions to widen, so weights of bfloat16 are given the
    power of two with which they fit, which no rounding sees; where they do not fit they keep theirs (uint16)."""
    parts = weight.split(ROWS)  # A matrix that needs its 32 bits says so at once.
    if weight.dtype is not torch.float32 or weight.numel() == 0:
        return weight.numpy(), NONE
    bfloat16 = not any((part.contiguous().view(torch.int32) & 0xFFFF).any() for part in parts)
    if FEATURES.get("f16c"):
        power = _power(weight) if bfloat16 else 1.0
        if all((part * power).half().float().equal(part * power) for part in parts):
            array = torch.cat([(part * power).half() for part in parts]).view(torch.int16).numpy()
            return array, NONE if power == 1 else np.array([1 / power], np.float32)
    return (weight.bfloat16().view(torch.uint16).numpy() if bfloat16 else weight.numpy()), NONE


def _power(weight: Tensor) -> float:
    """The power of two that makes the largest weight one of the largest numbers of float16."""
    largest = float(weight.abs().max())
    return 2.0 ** (14 - math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0


def few_rows(x: Tensor) -> bool:
    """Whether weights in blocks are for x [T, K], outside of torch.compile: float32 on a CPU, without gradients, and no
    more rows than BLAS is slower at."""
    return inference(x) and (Invariance.on or x.shape[0] <= ROWS)


class Blocked:
    """A projection's weights [N, K] once more, as decoding on a CPU reads them: float32 (in sixteen bits where they are
    no wider), or int8 with a scale [N]."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None):
        self.outputs = weight.shape[0]
        array, factor = narrowed(weight.detach())
        self.matrix = Matrix(
            to_blocks(array),
            factor if scale is None else as_float32(scale),
            NONE if bias is None else as_float32(bias.detach()),
        )
        self._run = Bound(project_any)
        self._tensors = tuple(torch.from_numpy(part) for part in self.matrix)
        self.eight = weight.dtype is torch.int8

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.matrix)

    def takes(self, x: Tensor) -> bool:
        """Whether x is what these weights are for. There is no gradient."""
        if x.dim() != 2 or x.is_cuda or torch.is_grad_enabled():
            return False
        return self.eight or (x.dtype is torch.float32 and (Invariance.on or x.shape[0] <= ROWS))

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], of the same type."""
        if torch.compiler.is_compiling():
            return cast("Tensor", blocked_linear(x, *self._tensors, self.outputs))
        return _project(self._run, x, self.matrix, self.outputs)


def _project(run: Callable[..., None], x: Tensor, matrix: Matrix, outputs: int) -> Tensor:
    out = np.empty((x.shape[0], outputs), np.float32)
    run(as_float32(x), matrix, out)
    made = tensor_of(out)
    return made if x.dtype is torch.float32 else made.to(x.dtype)


def _on_cpu(x: Tensor, blocks: Tensor, scale: Tensor, bias: Tensor, outputs: int) -> Tensor:
    return _project(project_any, x, Matrix(blocks.numpy(), scale.numpy(), bias.numpy()), outputs)


def _on_gpu(x: Tensor, blocks: Tensor, scale: Tensor, bias: Tensor, outputs: int) -> Tensor:
    raise NotImplementedError("weights in blocks are for CPUs")


def _shape_only(x: Tensor, blocks: Tensor, scale: Tensor, bias: Tensor, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


blocked_linear = define(
    "blocked_linear(Tensor x, Tensor blocks, Tensor scale, Tensor bias, int outputs) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
