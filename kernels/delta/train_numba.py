"""The diagonal-plus-low-rank recurrence and its gradient on a CPU, for training.

With dS the gradient of S_t, to which o_t = S_t^T q_t adds q_t do_t^T, and p_t = S_{t-1}^T a_t,

    dq = S_t do,  dk = dS v,  dv = dS^T k,  db = dS p,  dp = dS^T b,  da = S_{t-1} dp,
    dw = exp(w) rowsum(dS * S_{t-1}),  gradient of S_{t-1} = diag(exp(w)) dS + a dp^T.

The states that this needs are not kept for every token: the forward pass keeps each SPAN-th, and the backward
pass makes the ones between again, which fit into the cache. Against the scan and its gradient this takes half
the time where every key channel has its own decay, and a quarter for the general form; with one decay a head
the scan is as fast.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.fastmath import wide_vectors
from kernels.pool import as_float32

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SPAN = 16
ZERO = np.float32(0.0)


@numba.njit(fastmath=True, error_model="numpy", nogil=True)
def _step(S: Floats, d: Floats, k: Floats, v: Floats, a: Floats, b: Floats, p: Floats) -> None:
    """S = diag(d) S + b p^T + k v^T in place, with p = S^T a, which is written too."""
    wide_vectors()
    K, V = k.shape[0], v.shape[0]
    p[:] = ZERO
    for i in range(K):
        row, a_i = S[i], a[i]
        for j in range(V):
            p[j] += a_i * row[j]
    for i in range(K):
        row, d_i, b_i, k_i = S[i], d[i], b[i], k[i]
        for j in range(V):
            row[j] = d_i * row[j] + b_i * p[j] + k_i * v[j]


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def _forward(
    q: Floats,  # [T, H, K]
    d: Floats,  # exp of the log decay, as q
    k: Floats,
    v: Floats,  # [T, H, V]
    a: Floats,
    b: Floats,
    offsets: Ints,
    kept_at: Ints,  # [N]: where the kept states of each segment begin
    kept: Floats,  # [.., H, K, V], written
    out: Floats,  # [T, H, V], written
) -> None:
    H, K, V = q.shape[1], q.shape[2], v.shape[2]
    for task in numba.prange((len(offsets) - 1) * H):
        wide_vectors()
        s, h = task // H, task % H
        S, p = np.zeros((K, V), np.float32), np.empty(V, np.float32)
        for t in range(offsets[s], offsets[s + 1]):
            since = t - offsets[s]
            if since % SPAN == 0:
                kept[kept_at[s] + since // SPAN, h] = S
            _step(S, d[t, h], k[t, h], v[t, h], a[t, h], b[t, h], p)
            o, q_t = out[t, h], q[t, h]
            o[:] = ZERO
            for i in range(K):
                row, q_i = S[i], q_t[i]
                for j in range(V):
                    o[j] += q_i * row[j]


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def _backward(
    q: Floats,
    d: Floats,
    k: Floats,
    v: Floats,
    a: Floats,
    b: Floats,
    offsets: Ints,
    kept_at: Ints,
    kept: Floats,
    do: Floats,
    dq: Floats,
    dw: Floats,
    dk: Floats,
    dv: Floats,
    da: Floats,
    db: Floats,
) -> None:
    H, K, V = q.shape[1], q.shape[2], v.shape[2]
    for task in numba.prange((len(offsets) - 1) * H):
        wide_vectors()
        s, h = task // H, task % H
        states, ps = np.empty((SPAN + 1, K, V), np.float32), np.empty((SPAN, V), np.float32)
        dS, dp = np.zeros((K, V), np.float32), np.empty(V, np.float32)
        spans = (offsets[s + 1] - offsets[s] + SPAN - 1) // SPAN
        for span in range(spans - 1, -1, -1):
            first = offsets[s] + span * SPAN
            last = min(first + SPAN, offsets[s + 1])
            states[0] = kept[kept_at[s] + span, h]
            for t in range(first, last):
                n = t - first
                states[n + 1] = states[n]
                _step(states[n + 1], d[t, h], k[t, h], v[t, h], a[t, h], b[t, h], ps[n])
            for t in range(last - 1, first - 1, -1):
                before, after, p = states[t - first], states[t - first + 1], ps[t - first]
                do_t, v_t, dv_t = do[t, h], v[t, h], dv[t, h]
                dv_t[:] = ZERO
                dp[:] = ZERO
                for i in range(K):
                    row, now, was = dS[i], after[i], before[i]
                    q_i, k_i, b_i = q[t, h, i], k[t, h, i], b[t, h, i]
                    sum_q, sum_k, sum_b, sum_w = ZERO, ZERO, ZERO, ZERO
                    for j in range(V):
                        x = row[j] + q_i * do_t[j]
                        row[j] = x
                        dv_t[j] += k_i * x
                        dp[j] += b_i * x
                        sum_q += now[j] * do_t[j]
                        sum_k += x * v_t[j]
                        sum_b += x * p[j]
                        sum_w += x * was[j]
                    dq[t, h, i], dk[t, h, i], db[t, h, i] = sum_q, sum_k, sum_b
                    dw[t, h, i] = d[t, h, i] * sum_w
                for i in range(K):
                    row, was, d_i, a_i = dS[i], before[i], d[t, h, i], a[t, h, i]
                    sum_a = ZERO
                    for j in range(V):
                        sum_a += was[j] * dp[j]
                        row[j] = d_i * row[j] + a_i * dp[j]
                    da[t, h, i] = sum_a


class _Dplr(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, offsets: Tensor
    ) -> Tensor:
        inputs = [x.detach().float().contiguous() for x in (q, w.detach().exp(), k, v, a, b)]
        spans = (offsets.diff() + SPAN - 1) // SPAN
        kept = torch.empty(int(spans.sum()), *q.shape[1:], v.shape[2])
        more = [offsets, spans.cumsum(0) - spans, kept]
        out = torch.empty_like(inputs[3])
        _forward(*(x.numpy() for x in (*inputs, *more, out)))
        ctx.save_for_backward(*inputs, *more)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = [torch.empty_like(x) for x in ctx.saved_tensors[:6]]
        arrays = [x.numpy() for x in ctx.saved_tensors]
        _backward(*arrays, as_float32(grads[0]), *(x.numpy() for x in made))
        return (*made, None)


def dplr_train(
    q: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """As `dplr_scan` from zero states: packed q, w, k, a, b [T, H, K], v [T, H, V] -> o [T, H, V],
    float32."""
    return _Dplr.apply(q * scale, w, k, v, a, b, offsets)


def delta_train(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """As `delta_scan` from zero states, with a log decay g [T, Hg, K]: the general form with a = exp(g) k, b
    = -beta k."""
    q, k, g = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k, g))
    write = beta[..., None] * k
    return dplr_train(q, g, write, v, g.exp() * k, -write, offsets, scale)
