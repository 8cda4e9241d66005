"""The operations of adaptive depth for CPUs: the Triton kernels' loops, in numba."""

import numba
import numpy as np
import numpy.typing as npt

from kernels.fastmath import exp

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)
def depth_lora_numba(
    x: Floats,  # [T, in]
    A: Floats,  # [depths, parts, r, in]
    B: Floats,  # [depths, out, r]
    depths: Ints,  # [T]
    bounds: Ints,  # [parts + 1] of the parts in the outputs
    out: Floats,  # [T, out]
) -> None:
    parts, r, inputs = A.shape[1], A.shape[2], A.shape[3]
    for t in numba.prange(x.shape[0]):
        d = depths[t]
        x_t, out_t = x[t], out[t]
        low = np.empty(r, np.float32)
        for part in range(parts):
            for i in range(r):
                a = A[d, part, i]
                y = np.float32(0.0)
                for j in range(inputs):
                    y += a[j] * x_t[j]
                low[i] = y
            for o in range(bounds[part], bounds[part + 1]):
                b = B[d, o]
                y = np.float32(0.0)
                for i in range(r):
                    y += b[i] * low[i]
                out_t[o] = y


@numba.njit(cache=True, nogil=True)
def compact_numba(
    keys: Ints,  # [T]
    order: Ints,  # [T], written
    bounds: Ints,  # [groups + 1], written
) -> None:
    bounds[:] = 0
    for t in range(keys.shape[0]):
        bounds[keys[t] + 1] += 1
    for group in range(1, bounds.shape[0]):
        bounds[group] += bounds[group - 1]
    at = bounds[:-1].copy()
    for t in range(keys.shape[0]):
        order[at[keys[t]]] = t
        at[keys[t]] += 1


@numba.njit(fastmath={"nnan", "nsz"}, nogil=True)  # without which LLVM goes through them one by one
def _largest(logits: Floats) -> np.float32:
    largest = np.finfo(np.float32).min
    for x in logits:
        if x > largest:
            largest = x
    return largest


@numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, cache=True, nogil=True)
def confidence_numba(
    logits: Floats,  # [T, V]
    likeliest: Ints,  # [T]
    out: Floats,  # [T, 4], written: largest probability, its lead, entropy, likeliest token
) -> None:
    T, V = logits.shape
    for t in numba.prange(T):
        row, at = logits[t], likeliest[t]
        largest = row[at]
        second = max(_largest(row[:at]), _largest(row[at + 1 :]))
        total = weighted = np.float32(0.0)
        for v in range(V):
            e = exp(row[v] - largest)
            total += e
            weighted += e * row[v]
        probability = np.float32(1.0) / total
        out[t, 0] = probability
        out[t, 1] = probability * (np.float32(1.0) - exp(second - largest))
        entropy = largest + np.log(total) - weighted / total
        out[t, 2] = np.float32(0.0) if entropy < 0 else entropy  # NaN stays: nobody may leave by it
        out[t, 3] = at
