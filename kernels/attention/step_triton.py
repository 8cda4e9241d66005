"""Attention over a ring or pages in place, as Triton kernels: first all reads, then the new entries.

A program of the first owns the tokens of one block of a segment, for one key head and the query heads that
share it: its rows are (token, query head). It walks through the entries that any of its rows sees, in the
cache and then among the segment's own, with a running softmax. The second writes the new entries, and moves
the count: in a ring they take the place of entries that other programs of the first still need, so it is a
launch of its own.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _fold(
    q,  # [ROWS, BLOCK_D], scaled, as stored
    k_at,  # pointers [BLOCK_N] to the keys of this head
    v_at,
    inside,  # [BLOCK_N]: whether there is an entry
    seen,  # [ROWS, BLOCK_N]
    peak,
    weights,
    total,  # [ROWS], [ROWS], [ROWS, BLOCK_V], of the rows so far
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One block of entries into the softmax."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k = tl.load(k_at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if ROWS == 1:  # a product of matrices would waste 15 of its 16 rows
        s = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :]
    else:
        s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    s = tl.where(seen, s, -1e30)
    higher = tl.maximum(peak, tl.max(s, axis=1))
    fade = tl.exp(peak - higher)
    # A row that sees nothing here has no peak yet, perhaps: its e^0 must not count.
    p = tl.where(seen, tl.exp(s - higher[:, None]), 0.0)
    weights = weights * fade + tl.sum(p, axis=1)
    v = tl.load(v_at[:, None] + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
    if ROWS == 1:
        total = total * fade[:, None] + tl.sum(tl.trans(p) * v.to(tl.float32), axis=0)[None, :]
    else:
        total = total * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
    return higher, weights, total


@triton.jit
def attention_read_kernel(
    q_ptr,  # [T, HKV * G, D]
    k_ptr,  # [T, HKV, D], as stored; unused without APPEND
    v_ptr,  # [T, HKV, DV]
    k_cache_ptr,  # ring [slots, depths, BLOCK, HKV, D] or pages [pages, BLOCK, HKV, D]
    v_cache_ptr,
    tables_ptr,  # [slots, depths, max_pages] int64, unused for a ring
    count_ptr,  # [slots, depths, 1] float32
    entries_ptr,  # [T] int64, unused with APPEND
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    counts_ptr,  # [N] int64, written with APPEND: the counts before this call
    out_ptr,  # [T, HKV * G, DV]
    scale,
    softcap,
    window,
    k_first,  # strides of the cache: of a slot or page, of a depth or entry
    k_second,
    v_first,
    v_second,
    table_slot,
    table_depth,
    max_pages,
    count_slot,
    count_depth,
    BLOCK,  # entries of the ring, or of a page
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    GROUP: tl.constexpr,  # G, to the next power of two
    TOKENS: tl.constexpr,  # of one block
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGED: tl.constexpr,
    APPEND: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * GROUP
    segment, h = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    count = slot * 0  # int64; padding has no entries
    if APPEND:
        count = tl.load(count_ptr + slot * count_slot + depth * count_depth, mask=slot > 0, other=0.0).to(
            tl.int64
        )
        if (h == 0) & (tl.program_id(2) == 0):
            tl.store(counts_ptr + segment, count)

    row, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    head = h * G + row % GROUP
    stored = k_cache_ptr.dtype.element_ty
    for block in range(tl.program_id(2), tl.cdiv(last - first, TOKENS), tl.num_programs(2)):
        t = first + block * TOKENS + row // GROUP
        live = (t < last) & (row % GROUP < G)
        at = (t * (HKV * G) + head)[:, None]
        q = tl.load(q_ptr + at * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        q = (q.to(tl.float32) * scale).to(stored)
        if APPEND:
            end = count + t - first  # the last entry that each row sees
        else:
            end = tl.load(entries_ptr + t, mask=live, other=0)
        begin = tl.maximum(end - window + 1, 0)
        low = tl.min(tl.where(live, begin, 9223372036854775807), axis=0)
        high = tl.max(tl.where(live, end, -1), axis=0) + 1
        cached = high
        if APPEND:
            cached = tl.minimum(high, count)
        peak = tl.full([ROWS], -1e30, tl.float32)
        weights = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, BLOCK_V], tl.float32)

        for start in range(low // BLOCK_N * BLOCK_N, cached, BLOCK_N):
            e = start + n
            if PAGED:
                inside = (e >= low) & (e < cached) & (e // BLOCK < max_pages)
                table = tables_ptr + slot * table_slot + depth * table_depth
                page = tl.load(table + e // BLOCK, mask=inside, other=0)
                k_at = k_cache_ptr + page * k_first + (e % BLOCK) * k_second + h * D
                v_at = v_cache_ptr + page * v_first + (e % BLOCK) * v_second + h * DV
            else:
                inside = (e >= low) & (e < cached)
                k_at = k_cache_ptr + slot * k_first + depth * k_second + (e % BLOCK) * (HKV * D) + h * D
                v_at = v_cache_ptr + slot * v_first + depth * v_second + (e % BLOCK) * (HKV * DV) + h * DV
            seen = inside[None, :] & (e[None, :] <= end[:, None]) & (e[None, :] >= begin[:, None])
            peak, weights, total = _fold(
                q, k_at, v_at, inside, seen, peak, weights, total, softcap,
                D, DV, BLOCK_D, BLOCK_V, ROWS, SOFTCAP,
            )  # fmt: skip
        if APPEND:
            for start in range(tl.maximum(low, count) - count, high - count, BLOCK_N):
                i = start + n  # tokens of this segment
                inside = i < high - count
                e = count + i
                seen = inside[None, :] & (e[None, :] <= end[:, None]) & (e[None, :] >= begin[:, None])
                peak, weights, total = _fold(
                    q, k_ptr + ((first + i) * HKV + h) * D, v_ptr + ((first + i) * HKV + h) * DV,
                    inside, seen, peak, weights, total, softcap, D, DV, BLOCK_D, BLOCK_V, ROWS, SOFTCAP,
                )  # fmt: skip
        o = total / tl.maximum(weights, 1e-30)[:, None]
        tl.store(
            out_ptr + at * DV + dv[None, :],
            o.to(out_ptr.dtype.element_ty),
            mask=live[:, None] & (dv < DV)[None, :],
        )


@triton.jit
def _copy(from_ptr, to_ptr, WIDTH: tl.constexpr):
    STEP: tl.constexpr = 1024
    for at in tl.static_range(0, WIDTH, STEP):
        x = at + tl.arange(0, STEP)
        tl.store(to_ptr + x, tl.load(from_ptr + x, mask=x < WIDTH), mask=x < WIDTH)


@triton.jit
def attention_append_kernel(
    k_ptr,  # [T, HKV, D], as stored
    v_ptr,  # [T, HKV, DV]
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    count_ptr,
    slots_ptr,
    depths_ptr,
    offsets_ptr,
    counts_ptr,  # [N] int64: the counts before this call
    k_first,
    k_second,
    v_first,
    v_second,
    table_slot,
    table_depth,
    max_pages,
    count_slot,
    count_depth,
    BLOCK,
    WIDTH_K: tl.constexpr,  # HKV * D
    WIDTH_V: tl.constexpr,
    PAGED: tl.constexpr,
):
    segment = tl.program_id(0)
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    count = tl.load(counts_ptr + segment)
    begin = first
    if not PAGED:  # the first tokens of a segment longer than the ring would only be overwritten
        begin = tl.maximum(first, last - BLOCK)
    for t in range(begin + tl.program_id(1), last, tl.num_programs(1)):
        e = count + t - first
        if PAGED:
            page = tl.load(
                tables_ptr + slot * table_slot + depth * table_depth + e // BLOCK,
                mask=e // BLOCK < max_pages,
                other=0,
            )
            k_at = page * k_first + (e % BLOCK) * k_second
            v_at = page * v_first + (e % BLOCK) * v_second
        else:
            k_at = slot * k_first + depth * k_second + (e % BLOCK) * WIDTH_K
            v_at = slot * v_first + depth * v_second + (e % BLOCK) * WIDTH_V
        _copy(k_ptr + t * WIDTH_K, k_cache_ptr + k_at, WIDTH_K)
        _copy(v_ptr + t * WIDTH_V, v_cache_ptr + v_at, WIDTH_V)
    if (tl.program_id(1) == 0) & (slot > 0):
        tl.store(count_ptr + slot * count_slot + depth * count_depth, (count + last - first).to(tl.float32))
