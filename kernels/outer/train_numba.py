"""The outer-product recurrence and its gradient on a CPU, for training: two passes over the tokens, with the
state of one head in cache.

With dS_t = scale q_t do_t^T + exp(g_{t+1}) dS_{t+1}, the gradients are dq_t = scale S_t do_t, dk_t = dS_t
v_t, dv_t = dS_t^T k_t, and for the log decay the running sum from the end, dg_t = dg_{t+1} + q_t dq_t - k_t
dk_t (GLA, arXiv 2312.06635, section 4.3).
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.pool import array_of, as_float32

Floats = npt.NDArray[np.float32]


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)
def _forward(
    q: Floats, k: Floats, v: Floats, decay: Floats, offsets: npt.NDArray[np.int64], out: Floats
) -> None:
    """q (scaled), k, decay [T, H, K], v, out [T, H, V]; every segment from a zero state."""
    H, K, V = q.shape[1], q.shape[2], v.shape[2]
    for task in numba.prange((len(offsets) - 1) * H):
        s, h = task // H, task % H
        S = np.zeros((K, V), np.float32)
        for t in range(offsets[s], offsets[s + 1]):
            o, v_t = out[t, h], v[t, h]
            o[:] = 0.0
            for i in range(K):
                row, a, k_i, q_i = S[i], decay[t, h, i], k[t, h, i], q[t, h, i]
                for j in range(V):
                    x = a * row[j] + k_i * v_t[j]
                    row[j] = x
                    o[j] += q_i * x


@numba.njit(parallel=True, fastmath=True, cache=True, nogil=True)
def _backward(
    q: Floats,
    k: Floats,
    v: Floats,
    decay: Floats,
    offsets: npt.NDArray[np.int64],
    do: Floats,
    dq: Floats,
    dk: Floats,
    dv: Floats,
    dg: Floats,
) -> None:
    H, K, V = q.shape[1], q.shape[2], v.shape[2]
    for task in numba.prange((len(offsets) - 1) * H):
        s, h = task // H, task % H
        S = np.zeros((K, V), np.float32)
        for t in range(offsets[s], offsets[s + 1]):
            do_t, v_t = do[t, h], v[t, h]
            for i in range(K):
                row, a, k_i = S[i], decay[t, h, i], k[t, h, i]
                total = np.float32(0.0)
                for j in range(V):
                    x = a * row[j] + k_i * v_t[j]
                    row[j] = x
                    total += x * do_t[j]
                dq[t, h, i] = total
        S[:] = 0.0  # from here on the gradient of the state
        tail = np.zeros(K, np.float32)
        for t in range(offsets[s + 1] - 1, offsets[s] - 1, -1):
            do_t, v_t, dv_t = do[t, h], v[t, h], dv[t, h]
            dv_t[:] = 0.0
            for i in range(K):
                row, a, k_i, q_i = S[i], decay[t, h, i], k[t, h, i], q[t, h, i]
                total = np.float32(0.0)
                for j in range(V):
                    x = row[j] + q_i * do_t[j]
                    total += x * v_t[j]
                    dv_t[j] += x * k_i
                    row[j] = a * x
                dk[t, h, i] = total
                tail[i] += q_i * dq[t, h, i] - k_i * total
                dg[t, h, i] = tail[i]


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        q, k, v, decay = (x.detach().float().contiguous() for x in (q, k, v, g.detach().exp()))
        out = torch.empty_like(v)
        _forward(q.numpy(), k.numpy(), v.numpy(), decay.numpy(), array_of(offsets), out.numpy())
        ctx.save_for_backward(q, k, v, decay, offsets)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, offsets = ctx.saved_tensors
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, decay))
        arrays = (x.numpy() for x in (q, k, v, decay, offsets))
        _backward(*arrays, as_float32(grads[0]), dq.numpy(), dk.numpy(), dv.numpy(), dg.numpy())
        return dq, dk, dv, dg, None


def outer_train(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, offsets: Tensor, scale: float) -> Tensor:
    """As `outer_scan` from zero states, without the bonus: packed q, k, v, g -> o [T, heads, V], float32."""
    heads = max(q.shape[1], k.shape[1], v.shape[1], 1 if g is None else g.shape[1])
    if g is None:
        g = torch.zeros_like(k)
    if g.dim() == 2:
        g = g.unsqueeze(-1).expand(-1, -1, k.shape[2])
    each = [
        x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
        for x in (q * scale, k, v, g)
    ]
    return _Outer.apply(*each, offsets)
