"""The operations of adaptive depth as Triton kernels."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def depth_lora_kernel(
    x_ptr,  # [T, IN]
    A_ptr,  # [depths, PARTS, R, IN]
    B_ptr,  # [depths, OUT, R]
    depths_ptr,  # [T] int64
    bounds_ptr,  # [PARTS + 1] int64, of the parts in the outputs
    out_ptr,  # [T, OUT]
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,  # R, to the next power of two
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """A program owns one part of one token: A x in registers, then times B block by block. Nothing is shared between
    tokens, so that any mix of depths costs the same."""
    t, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.load(depths_ptr + t)
    r = tl.arange(0, BLOCK_R)
    in_r = r < R
    low = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, IN, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        x = tl.load(x_ptr + t * IN + i, mask=i < IN, other=0.0).to(tl.float32)
        a_ptr = A_ptr + (d * PARTS + part) * R * IN + r[:, None] * IN + i[None, :]
        a = tl.load(a_ptr, mask=in_r[:, None] & (i < IN)[None, :], other=0.0).to(
            tl.float32
        )  # [BLOCK_R, BLOCK_I]
        low += tl.sum(a * x[None, :], axis=1)
    first, last = tl.load(bounds_ptr + part), tl.load(bounds_ptr + part + 1)
    for start in range(first, last, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        b_ptr = B_ptr + d * OUT * R + o[:, None] * R + r[None, :]
        b = tl.load(b_ptr, mask=(o < last)[:, None] & in_r[None, :], other=0.0).to(
            tl.float32
        )  # [BLOCK_O, BLOCK_R]
        y = tl.sum(b * low[None, :], axis=1)
        tl.store(out_ptr + t * OUT + o, y.to(out_ptr.dtype.element_ty), mask=o < last)


@triton.jit
def compact_kernel(
    keys_ptr,  # [T] int64
    order_ptr,  # [T] int64
    bounds_ptr,  # [groups + 1] int64
    T,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, because a decoding batch is small and the order must be stable; the host is not asked for sizes."""
    at = tl.zeros([], tl.int64)
    tl.store(bounds_ptr, at)
    for group in range(GROUPS):
        for start in range(0, T, BLOCK):
            t = start + tl.arange(0, BLOCK)
            mine = (tl.load(keys_ptr + t, mask=t < T, other=-1) == group).to(tl.int64)
            place = at + tl.cumsum(mine, axis=0) - 1
            tl.store(order_ptr + place, t.to(tl.int64), mask=mine > 0)
            at += tl.sum(mine, axis=0)
        tl.store(bounds_ptr + group + 1, at)


@triton.jit
def confidence_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], unused without BIAS
    stats_ptr,  # [T, splits, 4] float32: largest logit, second, sum of exp(x - largest), sum of x exp(x - largest)
    likeliest_ptr,  # [T, splits] int64
    softcap,
    T,
    V,
    D: tl.constexpr,
    SPLIT: tl.constexpr,  # tokens of the vocabulary that one program looks at, a multiple of BLOCK_V
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns BLOCK_T tokens and a part of the vocabulary: logits live in registers, a block at a time."""
    split = tl.program_id(1)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    second = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    likeliest = tl.zeros([BLOCK_T], tl.int64)
    for start in range(0, SPLIT, BLOCK_V):
        v = split.to(tl.int64) * SPLIT + start + tl.arange(0, BLOCK_V)
        in_v = v < V
        logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for begin in range(0, D, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            x = tl.load(
                x_ptr + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
            )
            w_ptr = weight_ptr + v[None, :] * D + d[:, None]
            w = tl.load(w_ptr, mask=in_v[None, :] & (d < D)[:, None], other=0.0)  # [BLOCK_D, BLOCK_V]
            logits += tl.dot(x, w, input_precision="ieee")
        if BIAS:
            logits += tl.load(bias_ptr + v, mask=in_v, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
        logits = tl.where(in_v[None, :], logits, float("-inf"))
        block_largest = tl.max(logits, axis=1)
        block_at = tl.argmax(logits, axis=1)  # the first of equals
        others = tl.where(tl.arange(0, BLOCK_V)[None, :] == block_at[:, None], float("-inf"), logits)
        block_second = tl.max(others, axis=1)
        above = block_largest > largest
        second = tl.where(above, tl.maximum(largest, block_second), tl.maximum(second, block_largest))
        likeliest = tl.where(above, split.to(tl.int64) * SPLIT + start + block_at, likeliest)
        new = tl.maximum(largest, block_largest)
        reached = tl.where(new > float("-inf"), new, 0.0)  # a block beyond the vocabulary
        e = tl.exp(logits - reached[:, None])
        kept = tl.exp(largest - reached)
        total = total * kept + tl.sum(e, axis=1)
        weighted = weighted * kept + tl.sum(e * tl.where(in_v[None, :], logits, 0.0), axis=1)
        largest = new
    splits = tl.num_programs(1)
    at = (t * splits + split) * 4
    tl.store(stats_ptr + at, largest, mask=t < T)
    tl.store(stats_ptr + at + 1, second, mask=t < T)
    tl.store(stats_ptr + at + 2, total, mask=t < T)
    tl.store(stats_ptr + at + 3, weighted, mask=t < T)
    tl.store(likeliest_ptr + t * splits + split, likeliest, mask=t < T)
