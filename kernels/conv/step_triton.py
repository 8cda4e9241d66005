"""The short convolution in place on a pool of states, as a Triton kernel: one program a block of channels."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def conv_step_kernel(
    x_ptr,  # [T, C]
    weight_ptr,  # [C, W]
    bias_ptr,  # [C], unused without BIAS
    pool_ptr,  # [slots, depths, W - 1, C], float32
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    out_ptr,  # [T, C]
    slot_stride,
    depth_stride,
    C,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,  # W, to the next power of two
    BLOCK_C: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    segment = tl.program_id(1)
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)

    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.arange(0, BLOCK_W)
    in_c = c < C
    mask = (w < W)[:, None] & in_c[None, :]
    state_ptr = pool_ptr + slot * slot_stride + depth * depth_stride
    weight = tl.load(weight_ptr + c[None, :] * W + w[:, None], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)

    for t in range(first, last):
        # Input t - W + 1 + w comes from this segment where it lies inside, from the state where it lies
        # before.
        source = t - (W - 1) + w
        fresh = (source >= first)[:, None] & mask
        stale = (source < first)[:, None] & mask
        window = tl.load(x_ptr + source[:, None] * C + c[None, :], mask=fresh, other=0.0).to(tl.float32)
        window += tl.load(
            state_ptr + (source - first + W - 1)[:, None] * C + c[None, :], mask=stale, other=0.0
        )
        y = tl.sum(window * weight, axis=0)
        if BIAS:
            y += bias
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(out_ptr + t * C + c, y.to(out_ptr.dtype.element_ty), mask=in_c)

    # The new state: inputs last - (W - 1) .. last - 1, read whole before the old one is overwritten.
    source = last - (W - 1) + w
    kept = (w < W - 1)[:, None] & in_c[None, :]
    fresh = (source >= first)[:, None] & kept
    stale = (source < first)[:, None] & kept
    new = tl.load(x_ptr + source[:, None] * C + c[None, :], mask=fresh, other=0.0).to(tl.float32)
    new += tl.load(state_ptr + (source - first + W - 1)[:, None] * C + c[None, :], mask=stale, other=0.0)
    tl.debug_barrier()
    tl.store(state_ptr + w[:, None] * C + c[None, :], new, mask=kept)
