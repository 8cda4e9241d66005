"""The causal convolution in place on a pool of states, as Triton kernels: one program a block of channels."""

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


@triton.jit
def ring_read_kernel(
    x_ptr,  # [T, C]
    weight_ptr,  # [C, W], unused with TAPS
    bias_ptr,  # [C], unused without BIAS
    pool_ptr,  # [slots, depths, (W - 1) * DILATION, C], float32
    cursor_ptr,  # [slots, depths, 1], float32: where the oldest input lies, and the next will
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    cursors_ptr,  # [N] int64, written: the cursors before this call
    out_ptr,  # [T, C], or with TAPS what each token sees [T, W, C]
    slot_stride,
    depth_stride,
    cursor_slot_stride,
    cursor_depth_stride,
    C,
    W: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_W: tl.constexpr,  # W, to the next power of two
    BLOCK_C: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
):
    R: tl.constexpr = (W - 1) * DILATION
    segment = tl.program_id(1)
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    cursor = tl.load(cursor_ptr + slot * cursor_slot_stride + depth * cursor_depth_stride).to(tl.int64)
    if (tl.program_id(0) == 0) & (tl.program_id(2) == 0):
        tl.store(cursors_ptr + segment, cursor)

    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.arange(0, BLOCK_W)
    in_c = c < C
    mask = (w < W)[:, None] & in_c[None, :]
    state_ptr = pool_ptr + slot * slot_stride + depth * depth_stride
    if not TAPS:
        weight = tl.load(weight_ptr + c[None, :] * W + w[:, None], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)

    for t in range(first + tl.program_id(2), last, tl.num_programs(2)):
        source = t - (W - 1 - w) * DILATION
        fresh = (source >= first)[:, None] & mask
        stale = (source < first)[:, None] & mask
        seen = tl.load(x_ptr + source[:, None] * C + c[None, :], mask=fresh, other=0.0).to(tl.float32)
        at = (cursor + source - first + R) % R
        seen += tl.load(state_ptr + at[:, None] * C + c[None, :], mask=stale, other=0.0)
        if TAPS:
            seen_at = out_ptr + (t * W + w)[:, None] * C + c[None, :]
            tl.store(seen_at, seen.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            y = tl.sum(seen * weight, axis=0)
            if BIAS:
                y += bias
            if SILU:
                y = y * tl.sigmoid(y)
            tl.store(out_ptr + t * C + c, y.to(out_ptr.dtype.element_ty), mask=in_c)


@triton.jit
def ring_append_kernel(
    x_ptr,  # [T, C]
    pool_ptr,  # [slots, depths, R, C], float32
    cursor_ptr,  # [slots, depths, 1], float32
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    cursors_ptr,  # [N] int64: the cursors before this call
    slot_stride,
    depth_stride,
    cursor_slot_stride,
    cursor_depth_stride,
    C,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """After all have read: the last R inputs take the places of the oldest."""
    segment = tl.program_id(1)
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    cursor = tl.load(cursors_ptr + segment)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    state_ptr = pool_ptr + slot * slot_stride + depth * depth_stride
    for t in range(tl.maximum(first, last - R), last):
        x = tl.load(x_ptr + t * C + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(state_ptr + (cursor + t - first) % R * C + c, x, mask=c < C)
    if tl.program_id(0) == 0:
        moved = ((cursor + last - first) % R).to(tl.float32)
        tl.store(cursor_ptr + slot * cursor_slot_stride + depth * cursor_depth_stride, moved)
