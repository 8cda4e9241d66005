"""The delta rule and its general form in place on a pool of states, as a Triton kernel.

One program owns a tile [K, BLOCK_V] of one head's state: it reads it once, walks through the segment's tokens
with the tile in registers, and writes it once. The state is summed over K twice for every token, once for the
value to erase and once for the output; both sums are over the old state and do not wait for each other:

    S = S* + k u^T  =>  S^T q = S*^T q + (k . q) u
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def delta_step_kernel(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    v_ptr,  # [T, H, V]
    beta_ptr,  # [T, H], unused with DPLR
    g_ptr,  # log decay: [T, HG, K] (DECAY 2), [T, HG] (DECAY 1), unused (DECAY 0)
    a_ptr,  # [T, H, K], what DPLR reads of the state before its decay
    b_ptr,  # [T, H, K], where DPLR writes that
    pool_ptr,  # [slots, depths, H, K, V], float32
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    out_ptr,  # [T, H, V]
    scale,
    slot_stride,
    depth_stride,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,  # K, to the next power of two
    BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr,
    DPLR: tl.constexpr,
):
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    state = tl.program_id(0) // blocks  # not an axis of its own: those end at 65,535
    segment = state // H
    h = state % H
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)

    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = i < K, j < V
    # slot * stride passes 2^31 at a few thousand slots: the product is 64-bit.
    at = slot * slot_stride + depth * depth_stride + h * K * V
    tile_ptr = pool_ptr + at + i[:, None] * V + j[None, :]
    mask = in_k[:, None] & in_v[None, :]
    S = tl.load(tile_ptr, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_V]

    for t in range(first, last):
        q = tl.load(q_ptr + (t * HQ + h * HQ // H) * K + i, mask=in_k, other=0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + (t * HK + h * HK // H) * K + i, mask=in_k, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + (t * H + h) * V + j, mask=in_v, other=0.0).to(tl.float32)
        if DPLR:
            a = tl.load(a_ptr + (t * H + h) * K + i, mask=in_k, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + (t * H + h) * K + i, mask=in_k, other=0.0).to(tl.float32)
            read = tl.sum(S * a[:, None], axis=0)
        if DECAY == 2:
            g = tl.load(g_ptr + (t * HG + h * HG // H) * K + i, mask=in_k, other=0.0).to(tl.float32)
            S = S * tl.exp(g)[:, None]
        if DECAY == 1:
            S = S * tl.exp(tl.load(g_ptr + t * HG + h * HG // H).to(tl.float32))
        o = tl.sum(S * q[:, None], axis=0)
        if DPLR:
            o += tl.sum(b * q) * read + tl.sum(k * q) * v
            S += b[:, None] * read[None, :] + k[:, None] * v[None, :]
        else:
            beta = tl.load(beta_ptr + t * H + h).to(tl.float32)
            u = beta * (v - tl.sum(S * k[:, None], axis=0))
            o += tl.sum(k * q) * u
            S += k[:, None] * u[None, :]
        tl.store(out_ptr + (t * H + h) * V + j, o.to(out_ptr.dtype.element_ty), mask=in_v)

    tl.store(tile_ptr, S, mask=mask)
