"""The cells in place on a pool of states, for CPUs.

Two ways to the same numbers. `cell_step_numba`: a task holds one head of a few segments and walks through all
their tokens, the head's matrices in its core's cache, each row of them used for all the segments.
`cell_gates_numba`: R h is a matrix product over all segments (torch), token after token, and only the gates
are here.
"""

import numba
import numpy as np
import numpy.typing as npt

from kernels.cell.kinds import ELMAN, ELMAN_RELU, GRU, LSTM
from kernels.fastmath import exp, sigmoid
from kernels.pool import FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SEGMENTS = 4  # of one task
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)


@numba.njit(fastmath=True, nogil=True, error_model="numpy")
def _tanh(x: float) -> float:
    return _TWO * sigmoid(_TWO * x) - _ONE


@numba.njit(fastmath={"contract", "nsz", "arcp"}, nogil=True, error_model="numpy")
def _slstm(x: Floats, r: Floats, head: int, c: Floats, n: Floats, m: Floats, out: Floats) -> None:
    i_x, f_x, z_x, o_x = x[0, head], x[1, head], x[2, head], x[3, head]
    i_r, f_r, z_r, o_r = r[0], r[1], r[2], r[3]
    for d in range(out.shape[0]):
        i, f = i_x[d] + i_r[d], f_x[d] + f_r[d]
        decayed = m[d] + min(f, _ZERO) - np.log1p(exp(-abs(f)))
        peak = i if n[d] == _ZERO else max(decayed, i)
        forget = _ZERO if n[d] == _ZERO else exp(decayed - peak)
        write = exp(i - peak)
        c[d] = forget * c[d] + write * _tanh(z_x[d] + z_r[d])
        n[d] = forget * n[d] + write
        m[d] = peak
        out[d] = sigmoid(o_x[d] + o_r[d]) * c[d] / n[d]


@numba.njit(fastmath=True, nogil=True, error_model="numpy")
def _update(
    kind: int,
    x: Floats,  # [G, H, D] of one token
    r: Floats,  # [G, D]: R h and the bias
    head: int,
    h: Floats,  # [D]
    rest: Floats,  # flat: the other states of this head, `stride` apart, written
    stride: int,
    out: Floats,  # [D], written: the new h
) -> None:
    D = out.shape[0]
    if kind == ELMAN:
        for d in range(D):
            out[d] = _tanh(x[0, head, d] + r[0, d])
    elif kind == ELMAN_RELU:
        for d in range(D):
            out[d] = max(_ZERO, x[0, head, d] + r[0, d])
    elif kind == GRU:
        r_x, z_x, n_x, r_r, z_r, n_r = x[0, head], x[1, head], x[2, head], r[0], r[1], r[2]
        for d in range(D):
            keep = sigmoid(z_x[d] + z_r[d])
            fresh = _tanh(n_x[d] + sigmoid(r_x[d] + r_r[d]) * n_r[d])
            out[d] = keep * h[d] + (_ONE - keep) * fresh
    elif kind == LSTM:
        i_x, f_x, z_x, o_x = x[0, head], x[1, head], x[2, head], x[3, head]
        i_r, f_r, z_r, o_r = r[0], r[1], r[2], r[3]
        c = rest[:D]
        for d in range(D):
            c[d] = sigmoid(f_x[d] + f_r[d]) * c[d] + sigmoid(i_x[d] + i_r[d]) * _tanh(z_x[d] + z_r[d])
            out[d] = sigmoid(o_x[d] + o_r[d]) * _tanh(c[d])
    else:
        _slstm(x, r, head, rest[:D], rest[stride : stride + D], rest[2 * stride : 2 * stride + D], out)


@numba.njit(fastmath=True, nogil=True, error_model="numpy")
def _multiply(R: Floats, head: int, h: Floats, live: Ints, lives: int, r: Floats) -> None:
    """r [SEGMENTS, G, D] += R h, h [SEGMENTS, D], for segments live[:lives]; four rows of R at a time."""
    G, D = R.shape[0], R.shape[2]
    whole = D - D % 4
    for i in range(0, whole, 4):
        for g in range(G):
            r0, r1, r2, r3 = R[g, head, i], R[g, head, i + 1], R[g, head, i + 2], R[g, head, i + 3]
            for at in range(lives):
                s = live[at]
                h0, h1, h2, h3 = h[s, i], h[s, i + 1], h[s, i + 2], h[s, i + 3]
                to = r[s, g]
                for d in range(D):
                    to[d] += h0 * r0[d] + h1 * r1[d] + h2 * r2[d] + h3 * r3[d]
    for i in range(whole, D):
        for g in range(G):
            r0 = R[g, head, i]
            for at in range(lives):
                s = live[at]
                h0, to = h[s, i], r[s, g]
                for d in range(D):
                    to[d] += h0 * r0[d]


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True, error_model="numpy")
def cell_step_numba(
    kind: int,
    wx: Floats,  # [T, G, H, D]
    R: Floats,  # [G, H, D, D]
    bias: Floats,  # [G, H, D]
    data: Floats,  # the flat array of pool: numba drops stores into a tuple's member that it never sees read
    pool: FlatPool,  # [slots, depths, S, H, D]
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    begins: Ints,  # [N] the first token of each segment
    ends: Ints,  # [N] and the one behind its last
    out: Floats,  # [T, H, D]
) -> None:
    N, G, H, D = slots.shape[0], wx.shape[1], wx.shape[2], wx.shape[3]
    groups = (N + SEGMENTS - 1) // SEGMENTS
    for task in numba.prange(groups * H):
        begin, head = task // H * SEGMENTS, task % H
        here = min(SEGMENTS, N - begin)
        h, r = np.empty((SEGMENTS, D), np.float32), np.empty((SEGMENTS, G, D), np.float32)
        live, base = np.empty(SEGMENTS, np.int64), np.empty(SEGMENTS, np.int64)
        longest = 0
        for s in range(here):
            slot, depth = slots[begin + s], depths[begin + s]
            base[s] = pool.offset + slot * pool.slot_stride + depth * pool.depth_stride + head * D
            h[s] = data[base[s] : base[s] + D]
            longest = max(longest, ends[begin + s] - begins[begin + s])
        for t in range(longest):
            lives = 0
            for s in range(here):
                if t < ends[begin + s] - begins[begin + s]:
                    live[lives] = s
                    lives += 1
                    r[s] = bias[:, head]
            _multiply(R, head, h, live, lives, r)
            for at in range(lives):
                s = live[at]
                token = begins[begin + s] + t
                _update(kind, wx[token], r[s], head, h[s], data[base[s] + H * D :], H * D, out[token, head])
                h[s] = out[token, head]
        for s in range(here):
            data[base[s] : base[s] + D] = h[s]


@numba.njit(fastmath=True, cache=True, nogil=True, error_model="numpy")
def cell_gates_numba(
    kind: int,
    wx: Floats,  # [T, G, H, D]
    product: Floats,  # [G, H, N, D]: R h of the segments that go on
    bias: Floats,  # [G, H, D]
    state: Floats,  # [N, S, H, D], advanced
    tokens: Ints,  # [N] which token comes next in each
    out: Floats,  # [T, H, D]
) -> None:
    _, G, H, D = wx.shape
    stride = H * D
    flat = state.reshape(state.size)
    r, h = np.empty((G, D), np.float32), np.empty(D, np.float32)
    for n in range(product.shape[2]):
        for head in range(H):
            for g in range(G):
                to, from_, b = r[g], product[g, head, n], bias[g, head]
                for d in range(D):
                    to[d] = from_[d] + b[d]
            at = n * state.shape[1] * stride + head * D
            h[:] = flat[at : at + D]
            o = out[tokens[n], head]
            _update(kind, wx[tokens[n]], r, head, h, flat[at + stride :], stride, o)
            flat[at : at + D] = o
