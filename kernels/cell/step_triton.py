"""The cells in place on a pool of states, as a Triton kernel, for heads whose matrices fit into shared
memory.

One program owns one head of a block of segments: it reads their states once, walks through their tokens with
the states in registers, and writes them once. The loads of the matrices do not depend on the token: the
compiler moves them out of the loop, into shared memory.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _gate(x_at, R_at, bias_at, h, mask, square, in_d, BIAS: tl.constexpr):
    """(x, R h + b) of one gate: x and the result [BLOCK_N, BLOCK_D], R [BLOCK_D, BLOCK_D], b [BLOCK_D]."""
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    R = tl.load(R_at, mask=square, other=0.0).to(tl.float32)
    r = tl.dot(h, R, input_precision="tf32x3")
    if BIAS:
        r += tl.load(bias_at, mask=in_d, other=0.0).to(tl.float32)[None, :]
    return x, r


@triton.jit
def cell_step_kernel(
    wx_ptr,  # [T, G, H, D]
    R_ptr,  # [G, H, D, D]
    bias_ptr,  # [G, H, D], unused without BIAS
    pool_ptr,  # [slots, depths, S, H, D], float32
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    out_ptr,  # [T, H, D]
    N,
    slot_stride,
    depth_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, to the next power of two
    KIND: tl.constexpr,  # as in kernels.cell.kinds: elman 0, elman_relu 1, gru 2, lstm 3, slstm 4
    BIAS: tl.constexpr,
):
    head = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i, d = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D)
    in_n, in_d = n < N, d < D
    slot = tl.load(slots_ptr + n, mask=in_n, other=0).to(tl.int64)
    depth = tl.load(depths_ptr + n, mask=in_n, other=0).to(tl.int64)
    first = tl.load(offsets_ptr + n, mask=in_n, other=0)
    length = tl.load(offsets_ptr + n + 1, mask=in_n, other=0) - first

    held = in_n[:, None] & in_d[None, :]
    square = (i < D)[:, None] & in_d[None, :]
    at = pool_ptr + (slot * slot_stride + depth * depth_stride + head * D)[:, None] + d[None, :]
    R_at = R_ptr + head * D * D + i[:, None] * D + d[None, :]
    bias_at = bias_ptr + head * D + d
    GATE: tl.constexpr = H * D  # between two gates of wx and bias, and between two states
    h = tl.load(at, mask=held, other=0.0)
    if KIND >= 3:
        c = tl.load(at + GATE, mask=held, other=0.0)
    if KIND == 4:
        norm = tl.load(at + 2 * GATE, mask=held, other=0.0)
        m = tl.load(at + 3 * GATE, mask=held, other=0.0)

    for t in range(tl.max(length, axis=0)):
        live = (t < length)[:, None]
        mask = held & live
        x_at = wx_ptr + ((first + t) * G * GATE + head * D)[:, None] + d[None, :]
        x0, r0 = _gate(x_at, R_at, bias_at, h, mask, square, in_d, BIAS)
        if KIND == 0:
            new = _tanh(x0 + r0)
        if KIND == 1:
            new = tl.maximum(x0 + r0, 0.0)
        if KIND >= 2:
            x1, r1 = _gate(x_at + GATE, R_at + GATE * D, bias_at + GATE, h, mask, square, in_d, BIAS)
            x2, r2 = _gate(
                x_at + 2 * GATE, R_at + 2 * GATE * D, bias_at + 2 * GATE, h, mask, square, in_d, BIAS
            )
        if KIND == 2:
            keep = tl.sigmoid(x1 + r1)
            new = keep * h + (1.0 - keep) * _tanh(x2 + tl.sigmoid(x0 + r0) * r2)
        if KIND >= 3:
            x3, r3 = _gate(
                x_at + 3 * GATE, R_at + 3 * GATE * D, bias_at + 3 * GATE, h, mask, square, in_d, BIAS
            )
            z, o = _tanh(x2 + r2), tl.sigmoid(x3 + r3)
        if KIND == 3:
            c = tl.where(live, tl.sigmoid(x1 + r1) * c + tl.sigmoid(x0 + r0) * z, c)
            new = o * _tanh(c)
        if KIND == 4:
            write, forget = x0 + r0, x1 + r1
            decayed = m + tl.minimum(forget, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(forget)))
            fresh = norm == 0.0
            peak = tl.where(fresh, write, tl.maximum(decayed, write))
            write = tl.exp(write - peak)
            forget = tl.where(fresh, 0.0, tl.exp(decayed - peak))
            c = tl.where(live, forget * c + write * z, c)
            norm = tl.where(live, forget * norm + write, norm)
            m = tl.where(live, peak, m)
            new = o * c / norm
        h = tl.where(live, new, h)
        to = out_ptr + ((first + t) * GATE + head * D)[:, None] + d[None, :]
        tl.store(to, h.to(out_ptr.dtype.element_ty), mask=mask)

    tl.store(at, h, mask=held)
    if KIND >= 3:
        tl.store(at + GATE, c, mask=held)
    if KIND == 4:
        tl.store(at + 2 * GATE, norm, mask=held)
        tl.store(at + 3 * GATE, m, mask=held)
