"""The cells in place on a pool of states, as Triton kernels. One program owns one head of a block of segments
and walks through their tokens.

`cell_step_kernel` is for heads whose matrices fit into shared memory: the states stay in registers, and the
loads of the matrices do not depend on the token, so that the compiler moves them out of the loop.
`cell_wide_kernel` is for wider ones: the matrices come in blocks from the caches at every token, and the
output so far, in memory, holds the h that every block needs. Where each segment has one token, every block is a
program of its own, and the new h goes into the pool once all have read the old one.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _update(x0, x1, x2, x3, r0, r1, r2, r3, h, c, norm, m, KIND: tl.constexpr):
    """The states after one token, from the input's parts x and the recurrent parts r of the gates; what a
    kind does not have is passed through."""
    if KIND == 0:
        h = _tanh(x0 + r0)
    if KIND == 1:
        h = tl.maximum(x0 + r0, 0.0)
    if KIND == 2:
        keep = tl.sigmoid(x1 + r1)
        h = keep * h + (1.0 - keep) * _tanh(x2 + tl.sigmoid(x0 + r0) * r2)
    if KIND == 3:
        c = tl.sigmoid(x1 + r1) * c + tl.sigmoid(x0 + r0) * _tanh(x2 + r2)
        h = tl.sigmoid(x3 + r3) * _tanh(c)
    if KIND == 4:
        write, forget = x0 + r0, x1 + r1
        decayed = m + tl.minimum(forget, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(forget)))
        fresh = norm == 0.0
        m = tl.where(fresh, write, tl.maximum(decayed, write))
        write = tl.exp(write - m)
        forget = tl.where(fresh, 0.0, tl.exp(decayed - m))
        c = forget * c + write * _tanh(x2 + r2)
        norm = forget * norm + write
        h = tl.sigmoid(x3 + r3) * c / norm
    return h, c, norm, m


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
    out_ptr,  # [T, H, D], float32
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
    c, norm, m = h, h, h
    if KIND >= 3:
        c = tl.load(at + GATE, mask=held, other=0.0)
    if KIND == 4:
        norm = tl.load(at + 2 * GATE, mask=held, other=1.0)
        m = tl.load(at + 3 * GATE, mask=held, other=0.0)

    for t in range(tl.max(length, axis=0)):
        live = (t < length)[:, None]
        mask = held & live
        x_at = wx_ptr + ((first + t) * G * GATE + head * D)[:, None] + d[None, :]
        x0, r0 = _gate(x_at, R_at, bias_at, h, mask, square, in_d, BIAS)
        x1, r1, x2, r2, x3, r3 = x0, r0, x0, r0, x0, r0
        if KIND >= 2:
            at1, at2, R1, R2 = x_at + GATE, x_at + 2 * GATE, R_at + GATE * D, R_at + 2 * GATE * D
            x1, r1 = _gate(at1, R1, bias_at + GATE, h, mask, square, in_d, BIAS)
            x2, r2 = _gate(at2, R2, bias_at + 2 * GATE, h, mask, square, in_d, BIAS)
        if KIND >= 3:
            at3, R3 = x_at + 3 * GATE, R_at + 3 * GATE * D
            x3, r3 = _gate(at3, R3, bias_at + 3 * GATE, h, mask, square, in_d, BIAS)
        new_h, new_c, new_norm, new_m = _update(x0, x1, x2, x3, r0, r1, r2, r3, h, c, norm, m, KIND)
        h = tl.where(live, new_h, h)
        if KIND >= 3:
            c = tl.where(live, new_c, c)
        if KIND == 4:
            norm = tl.where(live, new_norm, norm)
            m = tl.where(live, new_m, m)
        tl.store(out_ptr + ((first + t) * GATE + head * D)[:, None] + d[None, :], h, mask=mask)

    tl.store(at, h, mask=held)
    if KIND >= 3:
        tl.store(at + GATE, c, mask=held)
    if KIND == 4:
        tl.store(at + 2 * GATE, norm, mask=held)
        tl.store(at + 3 * GATE, m, mask=held)


@triton.jit
def cell_wide_kernel(
    wx_ptr,  # as above
    R_ptr,
    bias_ptr,
    pool_ptr,
    slots_ptr,
    depths_ptr,
    offsets_ptr,
    out_ptr,
    N,
    slot_stride,
    depth_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of the new h at a time
    BLOCK_K: tl.constexpr,  # of the h before at a time
    SINGLE: tl.constexpr,  # one token each: a program makes one block of the new h, and leaves it in `out`
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
):
    head = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    slot = tl.load(slots_ptr + n, mask=in_n, other=0).to(tl.int64)
    depth = tl.load(depths_ptr + n, mask=in_n, other=0).to(tl.int64)
    first = tl.load(offsets_ptr + n, mask=in_n, other=0)
    length = tl.load(offsets_ptr + n + 1, mask=in_n, other=0) - first
    GATE: tl.constexpr = H * D
    state = pool_ptr + (slot * slot_stride + depth * depth_stride + head * D)[:, None]
    zero = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = tl.program_id(2) * BLOCK_D
    stop = start + 1 if SINGLE else D

    for t in range(tl.max(length, axis=0)):
        live = (in_n & (t < length))[:, None]
        from_pool, from_out = live & (t == 0), live & (t > 0)
        before = out_ptr + ((first + t - 1) * GATE + head * D)[:, None]
        for begin in range(start, stop, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            in_d = d < D
            mask = live & in_d[None, :]
            r0, r1, r2, r3 = zero, zero, zero, zero
            for low in range(0, D, BLOCK_K):
                k = low + tl.arange(0, BLOCK_K)
                in_k = (k < D)[None, :]
                h = tl.load(state + k[None, :], mask=from_pool & in_k, other=0.0)
                h += tl.load(before + k[None, :], mask=from_out & in_k, other=0.0)
                R_at = R_ptr + head * D * D + k[:, None] * D + d[None, :]
                square = (k < D)[:, None] & in_d[None, :]
                R0 = tl.load(R_at, mask=square, other=0.0).to(tl.float32)
                r0 += tl.dot(h, R0, input_precision="tf32x3")
                if KIND >= 2:
                    R1 = tl.load(R_at + GATE * D, mask=square, other=0.0).to(tl.float32)
                    R2 = tl.load(R_at + 2 * GATE * D, mask=square, other=0.0).to(tl.float32)
                    r1 += tl.dot(h, R1, input_precision="tf32x3")
                    r2 += tl.dot(h, R2, input_precision="tf32x3")
                if KIND >= 3:
                    R3 = tl.load(R_at + 3 * GATE * D, mask=square, other=0.0).to(tl.float32)
                    r3 += tl.dot(h, R3, input_precision="tf32x3")

            if BIAS:
                bias_at = bias_ptr + head * D + d
                r0 += tl.load(bias_at, mask=in_d, other=0.0).to(tl.float32)[None, :]
                if KIND >= 2:
                    r1 += tl.load(bias_at + GATE, mask=in_d, other=0.0).to(tl.float32)[None, :]
                    r2 += tl.load(bias_at + 2 * GATE, mask=in_d, other=0.0).to(tl.float32)[None, :]
                if KIND >= 3:
                    r3 += tl.load(bias_at + 3 * GATE, mask=in_d, other=0.0).to(tl.float32)[None, :]
            x_at = wx_ptr + ((first + t) * G * GATE + head * D)[:, None] + d[None, :]
            x0 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
            x1, x2, x3 = x0, x0, x0
            if KIND >= 2:
                x1 = tl.load(x_at + GATE, mask=mask, other=0.0).to(tl.float32)
                x2 = tl.load(x_at + 2 * GATE, mask=mask, other=0.0).to(tl.float32)
            if KIND >= 3:
                x3 = tl.load(x_at + 3 * GATE, mask=mask, other=0.0).to(tl.float32)
            h, c, norm, m = zero, zero, zero, zero
            at = state + d[None, :]
            if KIND == 2:
                h = tl.load(at, mask=from_pool & in_d[None, :], other=0.0)
                h += tl.load(before + d[None, :], mask=from_out & in_d[None, :], other=0.0)
            if KIND >= 3:
                c = tl.load(at + GATE, mask=mask, other=0.0)
            if KIND == 4:
                norm = tl.load(at + 2 * GATE, mask=mask, other=1.0)
                m = tl.load(at + 3 * GATE, mask=mask, other=0.0)
            h, c, norm, m = _update(x0, x1, x2, x3, r0, r1, r2, r3, h, c, norm, m, KIND)
            tl.store(out_ptr + ((first + t) * GATE + head * D)[:, None] + d[None, :], h, mask=mask)
            if KIND >= 3:
                tl.store(at + GATE, c, mask=mask)
            if KIND == 4:
                tl.store(at + 2 * GATE, norm, mask=mask)
                tl.store(at + 3 * GATE, m, mask=mask)
        tl.debug_barrier()  # the whole of h is in memory before the next token reads it

    if not SINGLE:
        moved = (in_n & (length > 0))[:, None]
        last = out_ptr + ((first + length - 1) * GATE + head * D)[:, None]
        for begin in range(0, D, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)[None, :]
            tl.store(state + d, tl.load(last + d, mask=moved & (d < D), other=0.0), mask=moved & (d < D))
