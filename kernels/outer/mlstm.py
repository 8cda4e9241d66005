"""mLSTM, the matrix memory of xLSTM (arXiv 2405.04517 eq. 19-27): exponential input gate, stabiliser,
normaliser.

    m_t = max(logsigmoid(f_t) + m_{t-1}, i_t)                                   one per head
    f' = exp(logsigmoid(f_t) + m_{t-1} - m_t),  i' = exp(i_t - m_t)
    C_t = f' C_{t-1} + i' k_t v_t^T             [K, V]
    n_t = f' n_{t-1} + i' k_t                   [K]
    h_t = scale C_t^T q_t / (max(|scale n_t . q_t|, exp(-m_t)) + eps)

C is a decayed outer-product state like any other once the gates and the denominator are known, and those
depend on n and m alone. So a step is two kernels: the first walks over n and m, one K-th of the state, and
hands on q' = scale q / denominator, k' = i' k and the log decay; the second is `outer`. C, n and m are the
scaled values above, laid out as in transformers' xlstm; a fresh state is all zeros, m included.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.library import define
from kernels.outer import outer, outer_scan
from kernels.outer.step_numba import mlstm_normalise_numba
from kernels.packing import pad, unpad
from kernels.pool import array_of, as_float32, flat

__all__ = ["mlstm", "mlstm_naive", "mlstm_normalise", "mlstm_scan"]

State = tuple[Tensor, Tensor, Tensor]
EPS = 1e-6


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_pool: Tensor | None,
    n_pool: Tensor | None,
    m_pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    eps: float = EPS,
) -> Tensor:
    """Packed q, k [T, H, K], v [T, H, V], gates before their activations i, f [T, H] -> h [T, H, V].

    Pools: c [slots, depths, H, K, V], n [slots, depths, H, K], m [slots, depths, H], advanced in place;
    without them the states start from zero and are dropped, and the result is differentiable (training).
    """
    if c_pool is None or n_pool is None or m_pool is None:
        return mlstm_scan(q, k, v, i, f, None, offsets, scale, eps)[0].to(v.dtype)
    q, k, g = mlstm_normalise(q, k, i, f, n_pool, m_pool, slots, depths, offsets, scale, eps)
    return outer(q, k, v, g, c_pool, slots, depths, offsets, scale=1.0).to(v.dtype)


def mlstm_naive(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State, scale: float, eps: float = EPS
) -> tuple[Tensor, State]:
    """One sequence, one token and head at a time: q, k [T, H, K], v [T, H, V], i, f [T, H]; state C [H, K,
    V], n [H, K], m [H]. Returns h [T, H, V] and the final state."""
    C, n, m = (x.clone() for x in state)
    out = torch.empty_like(v)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            log_f = F.logsigmoid(f[t, h])
            m_new = torch.maximum(log_f + m[h], i[t, h])
            forget, write = (log_f + m[h] - m_new).exp(), (i[t, h] - m_new).exp()
            C[h] = forget * C[h] + write * torch.outer(k[t, h], v[t, h])
            n[h] = forget * n[h] + write * k[t, h]
            m[h] = m_new
            read = torch.maximum((scale * n[h] @ q[t, h]).abs(), (-m_new).exp())
            out[t, h] = scale * (C[h].T @ q[t, h]) / (read + eps)
    return out, (C, n, m)


def mlstm_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State | None,
    offsets: Tensor,
    scale: float,
    eps: float = EPS,
) -> tuple[Tensor, State | None]:
    """As `mlstm_naive` over packed tokens, differentiable: state C [N, H, K, V], n [N, H, K], m [N, H], or
    None for fresh ones, which are then not returned."""
    log_f = F.logsigmoid(f.float())
    m, m_before = _stabilisers(i, log_f, None if state is None else state[2], offsets)
    g = log_f + m_before - m
    k = k.float() * (i.float() - m).exp().unsqueeze(-1)
    ones = torch.ones_like(v[..., :1], dtype=torch.float32)
    v_and_one = torch.cat([v.float(), ones], -1)  # the column of ones carries n
    ends: State | None = None
    if state is None:
        nowhere = torch.zeros(len(offsets) - 1, dtype=torch.int64, device=q.device)
        read = outer(q.float(), k, v_and_one, g, None, nowhere, nowhere, offsets, scale=scale)
    else:
        joint = torch.cat([state[0], state[1].unsqueeze(-1)], -1)
        read, joint = outer_scan(q.float(), k, v_and_one, g, joint, offsets, scale)
        ends = joint[..., :-1], joint[..., -1], _last(m, state[2], offsets)
    floor = torch.maximum(read[..., -1:].abs(), (-m).exp().unsqueeze(-1))
    return read[..., :-1] / (floor + eps), ends


def _stabilisers(i: Tensor, log_f: Tensor, start: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """m after and before every token, [T, H] each: m_t = F_t + max(m_0, max_{j <= t} i_j - F_j), with F the
    running sum of log f. In float64, because F grows with the length; without a gradient, because m cancels
    in h."""
    with torch.no_grad():
        longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
        total = pad(log_f.double(), offsets, longest).cumsum(1)  # [N, L, H]
        first = (
            total.new_zeros(total.shape[0], 1, total.shape[2])
            if start is None
            else start.double().unsqueeze(1)
        )
        best = torch.cat([first, pad(i.double(), offsets, longest) - total], 1).cummax(1).values
        m = total + best[:, 1:]
        before = torch.cat([first, m[:, :-1]], 1)
        return unpad(m, offsets).float(), unpad(before, offsets).float()


def _last(m: Tensor, start: Tensor, offsets: Tensor) -> Tensor:
    """The stabiliser at each segment's end [N, H]; that of the start where a segment is empty."""
    empty = (offsets.diff() == 0).unsqueeze(-1)
    last = (offsets[1:] - 1).clamp_min(0)
    return torch.where(empty, start, m[last]) if m.shape[0] else start


def _on_cpu(
    q: Tensor,
    k: Tensor,
    i: Tensor,
    f: Tensor,
    n_pool: Tensor,
    m_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q_out, k_out = np.empty(q.shape, np.float32), np.empty(k.shape, np.float32)
    g_out = np.empty(i.shape, np.float32)
    mlstm_normalise_numba(
        as_float32(q), as_float32(k), as_float32(i), as_float32(f), flat(n_pool), flat(m_pool),
        array_of(slots), array_of(depths), array_of(offsets), q_out, k_out, g_out,
        np.float32(scale), np.float32(eps),
    )  # fmt: skip
    return torch.from_numpy(q_out), torch.from_numpy(k_out), torch.from_numpy(g_out)


def _on_gpu(
    q: Tensor,
    k: Tensor,
    i: Tensor,
    f: Tensor,
    n_pool: Tensor,
    m_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    import triton

    from kernels.outer.step_triton import mlstm_normalise_kernel

    _, H, K = q.shape
    q_out, k_out, g_out = _shape_only(q, k, i, f, n_pool, m_pool, slots, depths, offsets, scale, eps)
    mlstm_normalise_kernel[(slots.shape[0] * H,)](
        q.contiguous(), k.contiguous(), i.contiguous(), f.contiguous(), n_pool, m_pool,
        slots, depths, offsets, q_out, k_out, g_out, scale, eps,
        n_pool.stride(0), n_pool.stride(1), m_pool.stride(0), m_pool.stride(1),
        H=H, K=K, BLOCK_K=triton.next_power_of_2(K), num_warps=1 if K <= 128 else 2,
    )  # fmt: skip
    return q_out, k_out, g_out


def _shape_only(
    q: Tensor,
    k: Tensor,
    i: Tensor,
    f: Tensor,
    n_pool: Tensor,
    m_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q_out, k_out = (
        torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q, k)
    )
    return q_out, k_out, torch.empty_like(i, dtype=torch.float32, memory_format=torch.contiguous_format)


mlstm_normalise = define(
    "mlstm_normalise(Tensor q, Tensor k, Tensor i, Tensor f, Tensor(a!) n_pool, Tensor(b!) m_pool, "
    "Tensor slots, Tensor depths, Tensor offsets, float scale, float eps) -> (Tensor, Tensor, Tensor)",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
