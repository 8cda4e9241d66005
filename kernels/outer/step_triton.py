"""The outer-product recurrence in place on a pool of states, as Triton kernels.

One program owns a tile [K, BLOCK_V] of one head's state: it reads it once, walks through the segment's tokens
with the tile in registers, and writes it once. Decay and bonus variants are compile-time branches.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def outer_step_kernel(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    v_ptr,  # [T, HV, V]
    g_ptr,  # log decay: [T, HG, V] (DECAY 3), [T, HG, K] (DECAY 2), [T, HG] (DECAY 1), unused (DECAY 0)
    u_ptr,  # bonus [H, K], unused without BONUS
    pool_ptr,  # [slots, depths, H, K, V], float32
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    out_ptr,  # [T, HO, V]
    scale,
    slot_stride,
    depth_stride,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    HG: tl.constexpr,
    HO: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,  # K, to the next power of two
    BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr,
    BONUS: tl.constexpr,
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
    if BONUS:
        u = tl.load(u_ptr + h * K + i, mask=in_k, other=0.0).to(tl.float32)

    for t in range(first, last):
        k = tl.load(k_ptr + (t * HK + h * HK // H) * K + i, mask=in_k, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + (t * HV + h * HV // H) * V + j, mask=in_v, other=0.0).to(tl.float32)
        write = k[:, None] * v[None, :]
        if BONUS:
            seen = S + u[:, None] * write
        if DECAY == 3:
            g = tl.load(g_ptr + (t * HG + h * HG // H) * V + j, mask=in_v, other=0.0).to(tl.float32)
            S = S * tl.exp(g)[None, :]
        if DECAY == 2:
            g = tl.load(g_ptr + (t * HG + h * HG // H) * K + i, mask=in_k, other=0.0).to(tl.float32)
            S = S * tl.exp(g)[:, None]
        if DECAY == 1:
            S = S * tl.exp(tl.load(g_ptr + t * HG + h * HG // H).to(tl.float32))
        S += write
        if not BONUS:
            seen = S
        for r in tl.static_range(HO // H):
            ho = h * (HO // H) + r
            q = tl.load(q_ptr + (t * HQ + ho * HQ // HO) * K + i, mask=in_k, other=0.0).to(tl.float32)
            o = tl.sum(seen * (q * scale)[:, None], axis=0)
            tl.store(out_ptr + (t * HO + ho) * V + j, o.to(out_ptr.dtype.element_ty), mask=in_v)

    tl.store(tile_ptr, S, mask=mask)


@triton.jit
def mlstm_normalise_kernel(
    q_ptr,  # [T, H, K]
    k_ptr,  # [T, H, K]
    i_ptr,  # [T, H], before the exponential
    f_ptr,  # [T, H], before the sigmoid
    n_ptr,  # [slots, depths, H, K], float32
    m_ptr,  # [slots, depths, H], float32
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    q_out_ptr,  # [T, H, K], float32
    k_out_ptr,  # [T, H, K], float32
    g_out_ptr,  # [T, H], float32
    scale,
    eps,
    n_slot_stride,
    n_depth_stride,
    m_slot_stride,
    m_depth_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # K, to the next power of two
):
    segment = tl.program_id(0) // H
    h = tl.program_id(0) % H
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    x = tl.arange(0, BLOCK_K)
    mask = x < K
    n_at = n_ptr + slot * n_slot_stride + depth * n_depth_stride + h * K + x
    m_at = m_ptr + slot * m_slot_stride + depth * m_depth_stride + h
    n = tl.load(n_at, mask=mask, other=0.0)
    m = tl.load(m_at)

    for t in range(first, last):
        q = tl.load(q_ptr + (t * H + h) * K + x, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + (t * H + h) * K + x, mask=mask, other=0.0).to(tl.float32)
        i = tl.load(i_ptr + t * H + h).to(tl.float32)
        f = tl.load(f_ptr + t * H + h).to(tl.float32)
        decayed = m + tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))
        m = tl.maximum(decayed, i)
        k = k * tl.exp(i - m)
        n = n * tl.exp(decayed - m) + k
        read = tl.abs(tl.sum(q * n, axis=0) * scale)
        factor = scale / (tl.maximum(read, tl.exp(tl.minimum(-m, 88.0))) + eps)
        tl.store(q_out_ptr + (t * H + h) * K + x, q * factor, mask=mask)
        tl.store(k_out_ptr + (t * H + h) * K + x, k, mask=mask)
        tl.store(g_out_ptr + t * H + h, decayed - m)

    tl.store(n_at, n, mask=mask)
    tl.store(m_at, m)
