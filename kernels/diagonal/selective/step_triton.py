"""The selective scan in place on a pool of states, as a Triton kernel.

One program owns a tile [N, BLOCK_C] of one state: it reads it once, walks through the segment's tokens with
the tile in registers, and writes it once. The sum over the N elements of a channel stays within few lanes.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def selective_step_kernel(
    x_ptr,  # [T, C]
    dt_ptr,  # [T, C]
    A_ptr,  # [N, C], float32
    B_ptr,  # [T, N]
    C_ptr,  # [T, N]
    D_ptr,  # [C], unused without SKIP
    z_ptr,  # [T, C], unused without GATE
    pool_ptr,  # [slots, depths, N, C], float32
    slots_ptr,  # [S] int64
    depths_ptr,  # [S] int64
    offsets_ptr,  # [S + 1] int64
    out_ptr,  # [T, C]
    slot_stride,
    depth_stride,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,  # N, to the next power of two
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
):
    segment = tl.program_id(1)
    # slot * stride passes 2^31 at some ten thousand slots: the product is 64-bit.
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)

    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    in_c, in_n = c < C, n < N
    mask = in_n[:, None] & in_c[None, :]
    within = n[:, None] * C + c[None, :]
    tile_ptr = pool_ptr + slot * slot_stride + depth * depth_stride + within
    h = tl.load(tile_ptr, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_C]
    A = tl.load(A_ptr + within, mask=mask, other=0.0)
    if SKIP:
        D = tl.load(D_ptr + c, mask=in_c, other=0.0).to(tl.float32)

    for t in range(first, last):
        x = tl.load(x_ptr + t * C + c, mask=in_c, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + t * C + c, mask=in_c, other=0.0).to(tl.float32)
        b = tl.load(B_ptr + t * N + n, mask=in_n, other=0.0).to(tl.float32)
        r = tl.load(C_ptr + t * N + n, mask=in_n, other=0.0).to(tl.float32)
        h = tl.exp(dt[None, :] * A) * h + b[:, None] * (dt * x)[None, :]
        y = tl.sum(r[:, None] * h, axis=0)
        if SKIP:
            y += D * x
        if GATE:
            z = tl.load(z_ptr + t * C + c, mask=in_c, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
        tl.store(out_ptr + t * C + c, y.to(out_ptr.dtype.element_ty), mask=in_c)

    tl.store(tile_ptr, h, mask=mask)
