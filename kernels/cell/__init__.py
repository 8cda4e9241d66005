"""Cells: a dense matrix per head and a nonlinearity between one state and the next. Elman, GRU, LSTM,
sLSTM."""

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.cell.kinds import KINDS
from kernels.cell.naive import cell_naive
from kernels.cell.scan import cell_scan
from kernels.cell.step_numba import SEGMENTS, Floats, Ints, cell_gates_numba, cell_step_numba
from kernels.invariance import Invariance
from kernels.library import define
from kernels.pool import array_of, as_float32, flat

__all__ = ["KINDS", "cell", "cell_naive", "cell_scan", "cell_step"]

WIDE = 64
"""Head width beyond which a head's matrices do not fit into a multiprocessor's shared memory, on a GPU."""
WARPS = 8
WIDE_BLOCKS = {"BLOCK_D": 64, "BLOCK_K": 32}


def cell(
    kind: str,
    wx: Tensor,
    R: Tensor,
    bias: Tensor | None,
    pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Advance each segment's cell over its tokens: the input's part of the gates wx [T, G, H, D], packed,
    recurrent matrices R [G, H, D, D] (from, to; a plain LSTM has one head), recurrent bias [G, H, D] -> h [T,
    H, D].

    Kinds, gates and states: kernels.cell.kinds; equations: kernels.cell.naive. The bias of the input goes
    into wx; the two differ in a GRU only. As many tokens as segments are one each. With a pool [slots,
    depths, S, H, D] the states are read and written in place; without one they start from zero and are
    dropped, and the result is differentiable (training).
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is none of {', '.join(KINDS)}")
    gates, states = len(KINDS[kind].gates), len(KINDS[kind].states)
    if wx.shape[1] != gates or R.shape[0] != gates:
        raise ValueError(f"wx, R: {kind} has {gates} gates, got {wx.shape[1]} and {R.shape[0]}")
    if pool is None:
        zero = wx.new_zeros(len(offsets) - 1, states, *wx.shape[2:], dtype=torch.float32)
        return cell_scan(kind, wx, R, bias, zero, offsets)[0].to(wx.dtype)
    if pool.shape[2] != states:
        raise ValueError(f"pool: {kind} has {states} states, got {pool.shape[2]}")
    return cell_step(wx, R, bias, pool, slots, depths, offsets, kind)


def _on_cpu(
    wx: Tensor,
    R: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    kind: str,
) -> Tensor:
    out = np.empty((wx.shape[0], *wx.shape[2:]), np.float32)
    recurrent_bias = np.zeros(R.shape[:3], np.float32) if bias is None else as_float32(bias)
    code, x, bounds = KINDS[kind].code, as_float32(wx), array_of(offsets)
    begins, ends = bounds[:-1], bounds[1:]
    if _in_step(slots.shape[0], *R.shape[1:3]):
        begins, ends, slots, depths = _token_by_token(
            code, x, R, recurrent_bias, pool, slots, depths, begins, ends, out
        )  # fmt: skip
    if len(begins):
        flat_pool = flat(pool)
        cell_step_numba(
            code,
            x,
            as_float32(R),
            recurrent_bias,
            flat_pool.data,
            flat_pool,
            array_of(slots),
            array_of(depths),
            begins,
            ends,
            out,
        )
    return torch.from_numpy(out).to(wx.dtype)


def _in_step(segments: int, heads: int, width: int) -> bool:
    """Whether a matrix product over all segments at each token beats the walk of one task a head and few
    segments: where many segments share the matrices, and where those are large and the tasks too few for the
    cores."""
    if Invariance.on:  # the two add up in different orders
        return False
    tasks = -(-segments // SEGMENTS) * heads
    return (width >= 128 and segments >= 8) or (width >= 512 and tasks < numba.get_num_threads())


def _token_by_token(
    kind: int,
    wx: Floats,
    R: Tensor,
    bias: Floats,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    begins: Ints,
    ends: Ints,
    out: Floats,
) -> tuple[Ints, Ints, Tensor, Tensor]:
    """All segments in step, the longest first, so that those which go on are always the first few; until too
    few are left. Returns the (begins, ends, slots, depths) that remain to be done."""
    G, H, D, _ = R.shape
    order = np.argsort(begins - ends, kind="stable")
    first, lengths = begins[order], (ends - begins)[order]
    slots, depths = slots[torch.from_numpy(order)], depths[torch.from_numpy(order)]
    state = pool[slots, depths]  # [N, S, H, D], a copy
    matrices, numbers = R.reshape(G * H, D, D), state.numpy()
    t, going = 0, int(np.count_nonzero(lengths))
    while going and _in_step(going, H, D):
        h = state[:going, 0].transpose(0, 1).to(R.dtype)  # [H, n, D]
        product = torch.bmm(h.expand(G, H, going, D).reshape(G * H, going, D), matrices)
        product_of = as_float32(product).reshape(G, H, going, D)
        cell_gates_numba(kind, wx, product_of, bias, numbers, first[:going] + t, out)
        t += 1
        going = int(np.searchsorted(-lengths, -t))  # as many are longer than t
    pool[slots, depths] = state
    return first[:going] + t, (first + lengths)[:going], slots[:going], depths[:going]


def _on_gpu(
    wx: Tensor,
    R: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    kind: str,
) -> Tensor:
    import triton

    from kernels.cell.step_triton import cell_step_kernel, cell_wide_kernel

    G, H, D, _ = R.shape
    N, block_n = slots.shape[0], 16
    out = wx.new_empty(wx.shape[0], H, D, dtype=torch.float32)  # h itself, of which later tokens are made
    wide = D > WIDE
    kernel = cell_wide_kernel if wide else cell_step_kernel
    single = wide and wx.shape[0] == N
    blocks = {**WIDE_BLOCKS, "SINGLE": single} if wide else {"BLOCK_D": max(16, triton.next_power_of_2(D))}
    kernel[(triton.cdiv(N, block_n), H, triton.cdiv(D, WIDE_BLOCKS["BLOCK_D"]) if single else 1)](
        wx.contiguous(), R.contiguous(), R if bias is None else bias.contiguous(), pool,
        slots, depths, offsets, out, N, pool.stride(0), pool.stride(1),
        H=H, D=D, G=G, BLOCK_N=block_n, **blocks, KIND=KINDS[kind].code, BIAS=bias is not None,
        num_warps=WARPS // 2 if single else WARPS,
    )  # fmt: skip
    if single:
        pool[slots, depths, 0] = out
    return out.to(wx.dtype)


def _shape_only(
    wx: Tensor,
    R: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    kind: str,
) -> Tensor:
    return wx.new_empty(wx.shape[0], *wx.shape[2:])


cell_step = define(
    "cell_step(Tensor wx, Tensor R, Tensor? bias, Tensor(a!) pool, Tensor slots, Tensor depths, "
    "Tensor offsets, str kind) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
