"""x + mlp(norm(x)) of a gated MLP with SiLU, on CPUs in one call: as separate operators the half of a layer is a dozen
calls from Python, which take a decoding step of few rows longer than the work."""

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

from kernels.bound import Bound
from kernels.gated import silu_product_numba
from kernels.linear.blocks_numba import Matrix, project_any
from kernels.norm import rms_norm_numba
from kernels.pool import Floats


class MLPWeights(NamedTuple):
    """D wide outside, I inside."""

    norm: Floats  # [D]
    eps: np.float32
    gate_up: Matrix  # [2 I, D]: the gate, then what it lets through
    down: Matrix  # [D, I]
    inner: int  # I


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def mlp_step_numba(
    x: Floats,  # [T, D]
    w: MLPWeights,
    out: Floats,  # [T, D]
) -> None:
    T, D = x.shape
    normed, both = np.empty((T, D), np.float32), np.empty((T, 2 * w.inner), np.float32)
    product = np.empty((T, w.inner), np.float32)
    rms_norm_numba(x, w.norm, w.eps, normed)
    project_any(normed, w.gate_up, both)
    silu_product_numba(both, product)
    project_any(product, w.down, out)
    for t in range(T):
        row, y = x[t], out[t]
        for i in range(D):
            y[i] += row[i]


def mlp_step(w: MLPWeights) -> Callable[[Floats], Floats]:
    """x [T, D], contiguous -> x + mlp(norm(x))."""
    run = Bound(mlp_step_numba)

    def step(x: Floats) -> Floats:
        out = np.empty_like(x)
        run(x, w, out)
        return out

    return step
