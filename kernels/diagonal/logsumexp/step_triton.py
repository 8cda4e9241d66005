"""Softmax averages in place on a pool of states, as a Triton kernel.

One program owns the numerators [BLOCK_H, V] of a block of heads with their denominators and scales; of
RWKV-4, whose heads are single channels, V is 1. The numerators are not cut along V: all of them need the old
scale of their head.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def logsumexp_step_kernel(
    s_ptr,  # scores or keys [T, H]
    v_ptr,  # [T, H, V]
    w_ptr,  # log decay [H], unused without BONUS
    u_ptr,  # bonus [H], unused without BONUS
    pool_ptr,  # [slots, depths, H * (V + 2)], float32: a [H, V], c [H], m [H]
    slots_ptr,  # [S] int64
    depths_ptr,  # [S] int64
    offsets_ptr,  # [S + 1] int64
    out_ptr,  # [T, H, V]
    slot_stride,
    depth_stride,
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,  # V, to the next power of two
    BONUS: tl.constexpr,
):
    segment = tl.program_id(1)
    # slot * stride passes 2^31 at some hundred thousand slots: the product is 64-bit.
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)

    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    j = tl.arange(0, BLOCK_V)
    in_h = h < H
    mask = in_h[:, None] & (j < V)[None, :]
    within = h[:, None] * V + j[None, :]
    base_ptr = pool_ptr + slot * slot_stride + depth * depth_stride
    a = tl.load(base_ptr + within, mask=mask, other=0.0)  # [BLOCK_H, BLOCK_V]
    c = tl.load(base_ptr + H * V + h, mask=in_h, other=0.0)
    m = tl.load(base_ptr + H * V + H + h, mask=in_h, other=0.0)
    if BONUS:
        w = tl.load(w_ptr + h, mask=in_h, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + h, mask=in_h, other=0.0).to(tl.float32)

    for t in range(first, last):
        s = tl.load(s_ptr + t * H + h, mask=in_h, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + t * H * V + within, mask=mask, other=0.0).to(tl.float32)
        m = tl.where(c == 0.0, -1e30, m)  # no past yet
        if BONUS:
            now = u + s
            top = tl.maximum(m, now)
            old, new = tl.exp(m - top), tl.exp(now - top)
            o = (a * old[:, None] + v * new[:, None]) / (c * old + new)[:, None]
            m += w
        top = tl.maximum(m, s)
        old, new = tl.exp(m - top), tl.exp(s - top)
        a = a * old[:, None] + v * new[:, None]
        c = c * old + new
        m = top
        if not BONUS:
            o = a / c[:, None]
        tl.store(out_ptr + t * H * V + within, o.to(out_ptr.dtype.element_ty), mask=mask)

    tl.store(base_ptr + within, a, mask=mask)
    tl.store(base_ptr + H * V + h, c, mask=in_h)
    tl.store(base_ptr + H * V + H + h, m, mask=in_h)
