"""RMS norm of the few rows of a decoding step, on CPUs: one call where torch makes six."""

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.fastmath import wide_vectors
from kernels.invariance import Invariance
from kernels.pool import Floats, inference

__all__ = ["few", "rms_norm_numba", "rms_norm_step"]

MOST = 1 << 16  # numbers; with more of them torch's calls cost nothing beside the work


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def rms_norm_numba(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """x, out [rows, size], weight [size]."""
    wide_vectors()
    for t in range(x.shape[0]):
        row, y = x[t], out[t]
        total = np.float32(0)
        for i in range(row.size):
            total += row[i] * row[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(row.size) + eps)
        for i in range(row.size):
            y[i] = row[i] * scale * weight[i]


def few(x: Tensor) -> bool:
    """Whether `rms_norm_step` may take x, and is quicker."""
    return inference(x) and (Invariance.on or (x.numel() <= MOST and x.is_contiguous()))


def rms_norm_step(x: Tensor, weight: Floats, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension: x [..., size], weight [size]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = weight.shape[0]
    rms_norm_numba(x.contiguous().view(-1, size).numpy(), weight, np.float32(eps), out.view(-1, size).numpy())
    return out
