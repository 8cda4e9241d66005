"""pLSTM on a sequence (arXiv 2506.11997): source, transition, mark and direct gates that mix J copies of the
state.

    C_t = T_t C_{t-1} + sum_{m,n} S_t[:, m, n] k_{t,m} v_{t,n}^T                        C: [J, K, V] y_{t,o} =
    scale sum_{a,j} M_t[o, a, j] C_{t-1,j}^T q_{t,a} + scale sum_{a,m,n} D_t[o, a, m, n] (q_{t,a} . k_{t,m})
    v_{t,n}

T is a matrix [J, J], so that the state can rotate (state tracking); with all of J and the numbers of queries,
keys, values and outputs per head at 1 every gate is a number: y = scale q (M C_{t-1} + D k v^T), C = T C + S
k v^T.

Source and mark are taken into the values and the queries first, which leaves the kernels C' = T C + sum_m k_m
w_m^T (w [J, M, V]) and y_o = sum_j C_j^T p_{o,j} (p [Y, J, K]); the direct term needs no state.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.library import define
from kernels.outer.plstm_numba import plstm_step_numba
from kernels.packing import pad, unpad
from kernels.pool import array_of, as_float32, flat

__all__ = ["plstm", "plstm_naive", "plstm_scan", "plstm_step"]


def plstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Packed q [T, H, A, K], k [T, H, M, K], v [T, H, N, V], source [T, H, J, M, N], transition [T, H, J, J]
    (to, from), mark [T, H, Y, A, J], direct [T, H, Y, A, M, N] -> y [T, H, Y, V].

    With a pool [slots, depths, H, J, K, V] the states are read and written in place; without one they start
    from zero and are dropped, and the result is differentiable (training).
    """
    p = scale * torch.einsum("thoaj,thak->thojk", mark, q)
    w = torch.einsum("thjmn,thnv->thjmv", source, v)
    now = torch.einsum("thoamn,tham,thnv->thov", direct, scale * (q @ k.transpose(-1, -2)), v)
    if pool is None:
        H, J, _M, V = w.shape[1:]
        zero = q.new_zeros(len(offsets) - 1, H, J, q.shape[3], V, dtype=torch.float32)
        read = plstm_scan(p, k, w, transition, zero, offsets)[0]
    else:
        read = plstm_step(p, k, w, transition, pool, slots, depths, offsets)
    return (read + now).to(v.dtype)


def plstm_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One sequence, one token and head at a time; shapes as in `plstm`, state [H, J, K, V]."""
    C = state.clone()
    out = torch.zeros(q.shape[0], q.shape[1], mark.shape[2], v.shape[3], dtype=q.dtype)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            new = torch.zeros_like(C[h])
            for o in range(mark.shape[2]):
                for a in range(q.shape[2]):
                    for j in range(C.shape[1]):
                        out[t, h, o] += scale * mark[t, h, o, a, j] * (C[h, j].T @ q[t, h, a])
            for m in range(k.shape[2]):
                for n in range(v.shape[2]):
                    write = torch.outer(k[t, h, m], v[t, h, n])
                    new += source[t, h, :, m, n, None, None] * write
                    for o in range(mark.shape[2]):
                        for a in range(q.shape[2]):
                            out[t, h, o] += scale * direct[t, h, o, a, m, n] * (write.T @ q[t, h, a])
            for i in range(C.shape[1]):
                for j in range(C.shape[1]):
                    new[i] += transition[t, h, i, j] * C[h, j]
            C[h] = new
    return out, C


def plstm_scan(
    p: Tensor, k: Tensor, w: Tensor, transition: Tensor, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Over packed tokens, all segments in step: p [T, H, Y, J, K], k [T, H, M, K], w [T, H, J, M, V],
    transition [T, H, J, J], state [N, H, J, K, V] -> y [T, H, Y, V] and the states at the ends, float32."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    ps, ks, ws, ts = (pad(x.float(), offsets, longest).unbind(1) for x in (p, k, w, transition))
    outs = []
    state = state.float()
    for t in range(longest):
        outs.append(torch.einsum("nhojk,nhjkv->nhov", ps[t], state))
        after = torch.einsum("nhij,nhjkv->nhikv", ts[t], state) + torch.einsum(
            "nhmk,nhjmv->nhjkv", ks[t], ws[t]
        )
        state = torch.where((t < lengths).view(-1, 1, 1, 1, 1), after, state)
    if not outs:
        return w.new_zeros(0, *p.shape[1:3], w.shape[4], dtype=torch.float32), state
    return unpad(torch.stack(outs, 1), offsets), state


def _on_cpu(
    p: Tensor,
    k: Tensor,
    w: Tensor,
    transition: Tensor,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    out = np.empty((p.shape[0], p.shape[1], p.shape[2], w.shape[4]), np.float32)
    plstm_step_numba(
        as_float32(p), as_float32(k), as_float32(w), as_float32(transition), flat(pool),
        array_of(slots), array_of(depths), array_of(offsets), out,
    )  # fmt: skip
    return torch.from_numpy(out)


def _on_gpu(
    p: Tensor,
    k: Tensor,
    w: Tensor,
    transition: Tensor,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    import triton

    from kernels.outer.plstm_triton import plstm_step_kernel

    _, H, Y, J, K = p.shape
    M, V = w.shape[3], w.shape[4]
    out = _shape_only(p, k, w, transition, pool, slots, depths, offsets)
    columns = block_v(J, K, V)
    plstm_step_kernel[(triton.cdiv(V, columns) * slots.shape[0] * H,)](
        p.contiguous(), k.contiguous(), w.contiguous(), transition.contiguous(), pool,
        slots, depths, offsets, out, pool.stride(0), pool.stride(1),
        H=H, Y=Y, J=J, M=M, K=K, V=V, BLOCK_J=triton.next_power_of_2(J),
        BLOCK_K=triton.next_power_of_2(K), BLOCK_V=columns, num_warps=4,
    )  # fmt: skip
    return out


def block_v(J: int, K: int, V: int) -> int:
    """Columns of a program: at most 8192 numbers of state, twice that while they are mixed."""
    import triton

    rows = triton.next_power_of_2(J) * triton.next_power_of_2(K)
    return min(triton.next_power_of_2(V), max(1, 8192 // rows), 32)


def _shape_only(
    p: Tensor,
    k: Tensor,
    w: Tensor,
    transition: Tensor,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    return p.new_empty(p.shape[0], p.shape[1], p.shape[2], w.shape[4], dtype=torch.float32)


plstm_step = define(
    "plstm_step(Tensor p, Tensor k, Tensor w, Tensor transition, Tensor(a!) pool, Tensor slots, "
    "Tensor depths, Tensor offsets) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
