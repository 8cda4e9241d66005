"""Linear recurrences with a given decay in place on a pool of states, as a Triton kernel.

One program owns a tile [N, BLOCK_C] of one state (two tiles of a complex one): it reads it once, walks
through the segment's tokens with the tile in registers, and writes it once.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def linear_step_kernel(
    u_ptr,  # input: [T, C]; [T, 2, C] for a complex state that is not read out
    decay_ptr,  # log decay [T, C]; COMPLEX: lambda [2, N, C]
    read_ptr,  # c [2, N, C], unused without READ
    skip_ptr,  # D [C], unused without SKIP
    pool_ptr,  # [slots, depths, C]; COMPLEX: [slots, depths, 2, N, C]; float32
    slots_ptr,  # [S] int64
    depths_ptr,  # [S] int64
    offsets_ptr,  # [S + 1] int64
    out_ptr,  # as u
    slot_stride,
    depth_stride,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,  # N, to the next power of two
    COMPLEX: tl.constexpr,
    READ: tl.constexpr,
    SKIP: tl.constexpr,
):
    segment = tl.program_id(1)
    # slot * stride passes 2^31 at some hundred thousand slots: the product is 64-bit.
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)

    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    in_c = c < C
    mask = (n < N)[:, None] & in_c[None, :]
    within = n[:, None] * C + c[None, :]
    tile_ptr = pool_ptr + slot * slot_stride + depth * depth_stride + within
    re = tl.load(tile_ptr, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_C]
    if COMPLEX:
        im = tl.load(tile_ptr + N * C, mask=mask, other=0.0)
        lam_re = tl.load(decay_ptr + within, mask=mask, other=0.0)
        lam_im = tl.load(decay_ptr + N * C + within, mask=mask, other=0.0)
    if READ:
        read_re = tl.load(read_ptr + within, mask=mask, other=0.0)
        read_im = tl.load(read_ptr + N * C + within, mask=mask, other=0.0)
    if SKIP:
        skip = tl.load(skip_ptr + c, mask=in_c, other=0.0).to(tl.float32)

    for t in range(first, last):
        if not COMPLEX:
            u = tl.load(u_ptr + t * C + within, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(decay_ptr + t * C + within, mask=mask, other=0.0).to(tl.float32)
            re = tl.exp(g) * re + u
            tl.store(out_ptr + t * C + within, re.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            old_re, old_im = re, im
            re = lam_re * old_re - lam_im * old_im
            im = lam_re * old_im + lam_im * old_re
            if READ:
                u = tl.load(u_ptr + t * C + c, mask=in_c, other=0.0).to(tl.float32)
                re += u[None, :]
                y = 2 * tl.sum(read_re * re - read_im * im, axis=0)
                if SKIP:
                    y += skip * u
                tl.store(out_ptr + t * C + c, y.to(out_ptr.dtype.element_ty), mask=in_c)
            else:
                at = t * 2 * C + within
                re += tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
                im += tl.load(u_ptr + at + C, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_ptr + at, re.to(out_ptr.dtype.element_ty), mask=mask)
                tl.store(out_ptr + at + C, im.to(out_ptr.dtype.element_ty), mask=mask)

    tl.store(tile_ptr, re, mask=mask)
    if COMPLEX:
        tl.store(tile_ptr + N * C, im, mask=mask)
