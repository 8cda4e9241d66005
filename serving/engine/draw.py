"""Drawing tokens on a CPU: one compiled pass over each row of logits, where torch makes six over all of them."""

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.fastmath import exp
from serving.engine.core import Floats, Ints

GROUP = 64
"""Weights that are added up at a time, before it is known in which of these sums the token lies."""

LEAST = np.float32(-87.0)
"""Of a logit's distance from the largest: what lies below has no weight in float32."""


@numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy", cache=True, nogil=True)
def _draw(
    logits: Floats,  # [R, V]
    temperature: Floats,  # [R]
    uniforms: npt.NDArray[np.float64],  # [R], in [0, 1)
    out: Ints,  # [R]
) -> None:
    R, V = logits.shape
    weights = np.zeros(-(-V // GROUP) * GROUP, np.float32)
    sums = np.empty(weights.size // GROUP, np.float64)
    for r in range(R):
        row, inverse = logits[r], np.float32(1) / temperature[r]
        largest, top = row[0], 0
        for v in range(V):
            if row[v] > largest:
                largest, top = row[v], v
        for v in range(V):
            below = (row[v] - largest) * inverse
            weights[v] = exp(below) if below >= LEAST else np.float32(0)
        total = 0.0
        for g in range(sums.size):
            part = 0.0
            for v in range(g * GROUP, (g + 1) * GROUP):
                part += weights[v]
            total += part
            sums[g] = total
        target = uniforms[r] * total
        g = 0
        while sums[g] <= target and sums[g] < total:  # a target just below the total may be rounded up to it
            g += 1
        at = sums[g - 1] if g else 0.0
        last = -1  # of those that have any weight
        for v in range(g * GROUP, min(V, (g + 1) * GROUP)):
            at += weights[v]
            if weights[v] > 0:
                last = v
                if at > target:
                    break
        out[r] = last if last >= 0 else top


def draw(logits: Tensor, temperature: Floats, uniforms: npt.NDArray[np.float64]) -> Ints:
    """A token for each row of logits [R, V], float32 on a CPU, at its temperature [R]: the inverse of the cumulative
    distribution at u [R]."""
    out = np.empty(len(uniforms), np.int64)
    _draw(logits.contiguous().numpy(), temperature, uniforms, out)
    return out


def draw_naive(logits: Tensor, temperature: Floats, uniforms: npt.NDArray[np.float64]) -> Ints:
    """The same by torch."""
    scaled = logits / torch.from_numpy(temperature).to(logits.device)[:, None]
    return invert(scaled.softmax(-1), uniforms)


def invert(weights: Tensor, uniforms: npt.NDArray[np.float64]) -> Ints:
    """The inverse of the cumulative distribution: weights [R, V], not necessarily normalised; u [R] -> indices [R]."""
    cumulative = weights.double().cumsum(-1)
    target = torch.from_numpy(uniforms).to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # u just below 1 may be rounded up to the total: take the last token that has any probability.
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(index, last).cpu().numpy()
