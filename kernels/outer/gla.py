"""What lies between GLA's projections, on CPUs in one call: decay, recurrence, norm and gate of each head. As separate
operators it is a dozen of torch's calls, which cost a decoding step of few rows more than the work."""

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from torch import Tensor

from kernels.bound import Bound
from kernels.fastmath import exp, silu, softplus
from kernels.linear.blocks_numba import Matrix, project_any
from kernels.norm import rms_norm_numba
from kernels.outer.step_numba import Floats, Ints
from kernels.pool import FlatPool, array_of, as_float32, flat, tensor_of


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def gla_step_numba(
    qkv: Floats,  # [T, at least H (2 K + V)]: q, k and v side by side, then anything
    decay: Floats,  # [T, H K], logits
    gate: Floats,  # [T, at least gate_at + H V]
    gate_at: int,  # column at which it begins; negative for none
    weight: Floats,  # [V] of the norm
    pool: FlatPool,  # [slots, depths, H, K, V]
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, H V]
    H: int,
    normalizer: float,
    scale: float,
    eps: float,
) -> None:
    V, K = weight.shape[0], decay.shape[1] // H
    for task in numba.prange(slots.shape[0] * H):
        s, h = task // H, task % H
        base = pool.offset + slots[s] * pool.slot_stride + depths[s] * pool.depth_stride + h * K * V
        S = pool.data[base : base + K * V]
        kept = np.empty(K, np.float32)
        for t in range(offsets[s], offsets[s + 1]):
            q, k = qkv[t, h * K : (h + 1) * K], qkv[t, (H + h) * K : (H + h + 1) * K]
            v, o = qkv[t, 2 * H * K + h * V : 2 * H * K + (h + 1) * V], out[t, h * V : (h + 1) * V]
            logits = decay[t, h * K : (h + 1) * K]
            for i in range(K):
                kept[i] = exp(-softplus(-logits[i]) / normalizer)
            o[:] = np.float32(0.0)
            for i in range(K):
                row, a, k_i, q_i = S[i * V : (i + 1) * V], kept[i], k[i], q[i] * scale
                for j in range(V):
                    x = a * row[j] + k_i * v[j]
                    row[j] = x
                    o[j] += q_i * x
            total = np.float32(0.0)
            for j in range(V):
                total += o[j] * o[j]
            norm = np.float32(1.0) / np.sqrt(total / np.float32(V) + eps)
            for j in range(V):
                o[j] = o[j] * norm * weight[j]
            if gate_at >= 0:
                g = gate[t, gate_at + h * V : gate_at + (h + 1) * V]
                for j in range(V):
                    o[j] *= silu(g[j])


def gla_step(
    qkv: Tensor,
    decay: Tensor,
    gate: Tensor,
    gate_at: int,
    weight: Floats,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    normalizer: float,
    scale: float,
    eps: float,
) -> Tensor:
    """Shapes as above, of a pool [slots, depths, H, K, V] that is advanced in place; float32 on a CPU. The log decay is
    log sigmoid(logits) / normalizer. What the output projection is given, [T, H V]."""
    H, _, V = pool.shape[2:]
    out = np.empty((qkv.shape[0], H * V), np.float32)
    gla_step_numba(
        as_float32(qkv),
        as_float32(decay),
        as_float32(gate),
        gate_at,
        weight,
        flat(pool),
        array_of(slots),
        array_of(depths),
        array_of(offsets),
        out,
        H,
        np.float32(normalizer),
        np.float32(scale),
        np.float32(eps),
    )
    return tensor_of(out)


class GLAWeights(NamedTuple):
    """H heads of K and V channels, R of the low-rank decay, D wide outside."""

    norm: Floats  # [D]
    eps: np.float32
    in_proj: Matrix  # [H (2 K + V) + R, D], and H V more with a gate: q, k, v, the low-rank decay, the gate
    decay: Matrix  # [H K, R]
    head_norm: Floats  # [V]
    head_eps: np.float32
    out_proj: Matrix  # [D, H V]
    heads: int  # H
    keys: int  # H K
    rank: int  # R
    gated: bool
    normalizer: np.float32
    scale: np.float32


# Not the one that is read from numba's cache on disk: see kernels/diagonal/selective/mixer_numba.py.
_gla_step = numba.njit(parallel=True, fastmath=True, error_model="numpy", nogil=True)(gla_step_numba.py_func)


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def gla_mixer_numba(
    x: Floats,  # [T, D]
    w: GLAWeights,
    pool: FlatPool,  # [slots, depths, H, K, V]
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, D]
) -> None:
    T, D = x.shape
    values = w.heads * w.head_norm.shape[0]
    low_at = 2 * w.keys + values
    gate_at = low_at + w.rank if w.gated else -1
    f32 = np.float32
    normed = np.empty((T, D), f32)
    rms_norm_numba(x, w.norm, w.eps, normed)
    made = np.empty((T, low_at + w.rank + (values if w.gated else 0)), f32)
    project_any(normed, w.in_proj, made)
    decay, o = np.empty((T, w.keys), f32), np.empty((T, values), f32)
    project_any(made[:, low_at : low_at + w.rank].copy(), w.decay, decay)
    _gla_step(
        made, decay, made, gate_at, w.head_norm, pool, slots, depths, offsets, o,
        w.heads, w.normalizer, w.scale, w.head_eps,
    )  # fmt: skip
    project_any(o, w.out_proj, out)
    for t in range(T):
        row, y = x[t], out[t]
        for i in range(D):
            y[i] += row[i]


def gla_mixer(w: GLAWeights) -> Callable[[Floats, Tensor, Ints, Ints, Ints], Floats]:
    """x [T, D], contiguous, a pool, slots, depths, offsets -> x + mixer(norm(x)), in one call; the pool, on a CPU, is
    advanced in place."""
    run = Bound(gla_mixer_numba)

    def mixer(x: Floats, pool: Tensor, slots: Ints, depths: Ints, offsets: Ints) -> Floats:
        out = np.empty_like(x)
        run(x, w, flat(pool), slots, depths, offsets, out)
        return out

    return mixer
