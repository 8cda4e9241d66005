"""Attention over a ring or pages in place, for CPUs: for decoding and short segments.

The work is cut at every CHUNK-th entry of a sequence, so that one long sequence keeps all cores busy, and
always at the same entries, so that a sequence's result does not depend on what else is in the batch. A task
is one token's look at one chunk, all heads together, because the heads of an entry lie side by side in
memory; a token's parts are put together afterwards. New entries are read from k and v, and written into the
cache last: in a ring they take the place of entries that earlier tokens of the segment still see.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.attention.cache import FlatCache
from kernels.fastmath import exp
from kernels.pool import PADDING_SLOT, FlatPool

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Stored = npt.NDArray[Any]  # float32, or bfloat16 as uint16

CHUNK = 128  # entries of one task
RUN = 64  # entries between two updates of the running maximum
_LOWEST = np.float32(-1e30)  # stands for -inf, which fastmath may not see
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)


@intrinsic
def _wide(context: Any, x: Any) -> Any:
    """A stored number as float32: bfloat16 is the upper half of a float32."""

    def widen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    def keep(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return types.float32(x), widen if x == types.uint16 else keep


@numba.njit(fastmath=True, nogil=True, error_model="numpy")
def _score(
    q: Floats,  # [Hq, D] of one token
    keys: Stored,  # flat: entry j, head h at `at + j * step + h * D`
    at: int,
    step: int,
    Hkv: int,
    run: int,
    scale: float,
    softcap: float,  # 0 for none
    scores: Floats,  # [Hq, RUN], written
) -> None:
    """Four entries at a time: one pass over the query serves four products."""
    Hq, D = q.shape
    G = Hq // Hkv
    whole = run - run % 4
    for j in range(0, whole, 4):
        for h in range(Hkv):
            first = at + j * step + h * D
            k0, k1 = keys[first : first + D], keys[first + step : first + step + D]
            k2, k3 = (
                keys[first + 2 * step : first + 2 * step + D],
                keys[first + 3 * step : first + 3 * step + D],
            )
            for g in range(h * G, h * G + G):
                query = q[g]
                s0 = s1 = s2 = s3 = _ZERO
                for d in range(D):
                    s0 += query[d] * _wide(k0[d])
                    s1 += query[d] * _wide(k1[d])
                    s2 += query[d] * _wide(k2[d])
                    s3 += query[d] * _wide(k3[d])
                scores[g, j], scores[g, j + 1], scores[g, j + 2], scores[g, j + 3] = s0, s1, s2, s3
    for j in range(whole, run):
        for g in range(Hq):
            first = at + j * step + g // G * D
            key, query = keys[first : first + D], q[g]
            s0 = _ZERO
            for d in range(D):
                s0 += query[d] * _wide(key[d])
            scores[g, j] = s0
    for g in range(Hq):
        row = scores[g]
        for j in range(run):
            row[j] *= scale
        if softcap > _ZERO:
            for j in range(run):
                row[j] = softcap * (_TWO / (_ONE + exp(-_TWO / softcap * row[j])) - _ONE)


@numba.njit(fastmath=True, nogil=True, error_model="numpy")
def _weigh(
    values: Stored,  # flat: entry j, head h at `at + j * step + h * Dv`
    at: int,
    step: int,
    Hkv: int,
    run: int,
    scores: Floats,  # [Hq, RUN]
    sums: Floats,  # [Hq, Dv], advanced: values weighted by e^(score - peak)
    norms: Floats,  # [Hq, 2], advanced: the peak, the sum of the weights
) -> None:
    Hq, Dv = sums.shape
    G = Hq // Hkv
    for g in range(Hq):
        row, total, peak, weights = scores[g], sums[g], norms[g, 0], _ZERO
        for j in range(run):
            peak = max(peak, row[j])
        fade = exp(norms[g, 0] - peak)
        for j in range(run):
            row[j] = exp(row[j] - peak)
            weights += row[j]
        norms[g, 0], norms[g, 1] = peak, norms[g, 1] * fade + weights
        for d in range(Dv):
            total[d] *= fade
    whole = run - run % 4
    for j in range(0, whole, 4):
        for h in range(Hkv):
            first = at + j * step + h * Dv
            v0, v1 = values[first : first + Dv], values[first + step : first + step + Dv]
            v2 = values[first + 2 * step : first + 2 * step + Dv]
            v3 = values[first + 3 * step : first + 3 * step + Dv]
            for g in range(h * G, h * G + G):
                total = sums[g]
                w0, w1, w2, w3 = scores[g, j], scores[g, j + 1], scores[g, j + 2], scores[g, j + 3]
                for d in range(Dv):
                    total[d] += w0 * _wide(v0[d]) + w1 * _wide(v1[d]) + w2 * _wide(v2[d]) + w3 * _wide(v3[d])
    for j in range(whole, run):
        for g in range(Hq):
            first = at + j * step + g // G * Dv
            value, total, w0 = values[first : first + Dv], sums[g], scores[g, j]
            for d in range(Dv):
                total[d] += w0 * _wide(value[d])


@numba.njit(nogil=True)
def _address(
    cache: FlatCache, width: int, block: int, tables: FlatPool, paged: bool, slot: int, depth: int, e: int
) -> int:
    """Where entry e begins; `width` numbers an entry."""
    if paged:
        row = tables.offset + slot * tables.slot_stride + depth * tables.depth_stride
        page = cache.offset + tables.data[row + e // block] * cache.first_stride
        return page + (e % block) * cache.second_stride
    return cache.offset + slot * cache.first_stride + depth * cache.second_stride + (e % block) * width


@numba.njit(nogil=True)
def _plan(
    counts: Ints,  # [N] entries before this call
    offsets: Ints,
    entries: Ints,
    limit: int,
    window: int,
    segment: Ints,  # [T], written
    last: Ints,  # [T], written: the last entry that the token sees
    start: Ints,  # [T + 1], written: where the token's tasks begin; none for segments over the limit
) -> None:
    start[0] = 0
    for s in range(counts.shape[0]):
        skipped = offsets[s + 1] - offsets[s] > limit
        for t in range(offsets[s], offsets[s + 1]):
            segment[t] = s
            last[t] = entries[t] if entries.shape[0] > 0 else counts[s] + t - offsets[s]
            chunks = last[t] // CHUNK - max(0, last[t] - window + 1) // CHUNK + 1
            start[t + 1] = start[t] + (0 if skipped else chunks)


@numba.njit(parallel=True, fastmath=True, nogil=True, error_model="numpy")
def _read(
    q: Floats,
    new_k: Stored,
    new_v: Stored,
    k_cache: FlatCache,
    v_cache: FlatCache,
    block: int,
    tables: FlatPool,
    paged: bool,
    slots: Ints,
    depths: Ints,
    offsets: Ints,
    cached: Ints,  # [N] entries from here on are in new_k and new_v
    window: int,
    scale: float,
    softcap: float,
    segment: Ints,
    last: Ints,
    start: Ints,
    token: Ints,  # [tasks] the token of each task
    sums: Floats,  # [tasks, Hq, Dv], written
    norms: Floats,  # [tasks, Hq, 2], written
) -> None:
    Hkv, D, Dv = new_k.shape[1], q.shape[2], new_v.shape[2]
    keys, values = new_k.reshape(new_k.size), new_v.reshape(new_v.size)
    for task in numba.prange(token.shape[0]):
        t = token[task]
        s = segment[t]
        lowest = max(0, last[t] - window + 1)
        chunk = lowest // CHUNK + task - start[t]
        e, end = max(lowest, chunk * CHUNK), min(last[t] + 1, (chunk + 1) * CHUNK)
        scores = np.empty((q.shape[1], RUN), np.float32)
        sums[task] = _ZERO
        norms[task, :, 0], norms[task, :, 1] = _LOWEST, _ZERO
        while e < end:
            if e < cached[s]:
                run = min(RUN, end - e, cached[s] - e, block - e % block)
                k_at = _address(k_cache, Hkv * D, block, tables, paged, slots[s], depths[s], e)
                v_at = _address(v_cache, Hkv * Dv, block, tables, paged, slots[s], depths[s], e)
                k_step = k_cache.second_stride if paged else Hkv * D
                v_step = v_cache.second_stride if paged else Hkv * Dv
                _score(q[t], k_cache.data, k_at, k_step, Hkv, run, scale, softcap, scores)
                _weigh(v_cache.data, v_at, v_step, Hkv, run, scores, sums[task], norms[task])
            else:
                run = min(RUN, end - e)
                at = (offsets[s] + e - cached[s]) * Hkv
                _score(q[t], keys, at * D, Hkv * D, Hkv, run, scale, softcap, scores)
                _weigh(values, at * Dv, Hkv * Dv, Hkv, run, scores, sums[task], norms[task])
            e += run


@numba.njit(parallel=True, fastmath=True, nogil=True, error_model="numpy")
def _join(sums: Floats, norms: Floats, start: Ints, out: Floats) -> None:
    """The softmax over all chunks of a token, from those of each."""
    for t in numba.prange(out.shape[0]):
        first, end = start[t], start[t + 1]
        for g in range(out.shape[1] if first < end else 0):
            o, peak, weights = out[t, g], _LOWEST, _ZERO
            for c in range(first, end):
                peak = max(peak, norms[c, g, 0])
            o[:] = _ZERO
            for c in range(first, end):
                part, fade = sums[c, g], exp(norms[c, g, 0] - peak)
                weights += norms[c, g, 1] * fade
                for d in range(o.shape[0]):
                    o[d] += fade * part[d]
            for d in range(o.shape[0]):
                o[d] /= weights


@numba.njit(nogil=True)
def _append(
    new: Stored,  # [T, Hkv, D]
    data: Stored,  # the cache's flat array: numba drops stores into a tuple's member that it never sees read
    cache: FlatCache,
    block: int,
    tables: FlatPool,
    paged: bool,
    slots: Ints,
    depths: Ints,
    offsets: Ints,
    counts: Ints,
    limit: int,
) -> None:
    width = new.shape[1] * new.shape[2]
    flat = new.reshape(new.size)
    for s in range(slots.shape[0]):
        length = offsets[s + 1] - offsets[s]
        # The first tokens of a segment longer than the ring would only be overwritten.
        begin = 0 if paged else max(0, length - block)
        for i in range(begin, length if length <= limit else begin):
            to = _address(cache, width, block, tables, paged, slots[s], depths[s], counts[s] + i)
            at = (offsets[s] + i) * width
            data[to : to + width] = flat[at : at + width]


@numba.njit(nogil=True)
def _outgrown(counts: Ints, offsets: Ints, entries: Ints, room: int) -> int:
    """The first segment that has more than `room` entries, or -1."""
    reading = entries.shape[0] > 0
    for s in range(counts.shape[0]):
        top = 0 if reading else counts[s] + offsets[s + 1] - offsets[s]
        for t in range(offsets[s], offsets[s + 1] if reading else offsets[s]):
            top = max(top, entries[t] + 1)
        if top > room:
            return s
    return -1


@numba.njit(cache=True, nogil=True)
def attention_step_numba(
    q: Floats,  # [T, Hq, D]
    new_k: Stored,  # [T, Hkv, D], as stored; [0, Hkv, D] to read only
    new_v: Stored,  # [T, Hkv, Dv]
    entries: Ints,  # [T] the last entry that each token sees, to read only; else [0]
    k_data: Stored,  # the flat array of k_cache
    v_data: Stored,
    k_cache: FlatCache,
    v_cache: FlatCache,
    block: int,  # entries of the ring, or of a page
    tables: FlatPool,  # [slots, depths, max_pages], int64; unused for a ring
    max_pages: int,  # 0 for a ring
    count_data: Floats,  # the flat array of count_pool
    count_pool: FlatPool,
    slots: Ints,  # [N]
    depths: Ints,  # [N]
    offsets: Ints,  # [N + 1]
    out: Floats,  # [T, Hq, Dv]
    window: int,
    limit: int,  # longer segments are left alone
    scale: float,
    softcap: float,  # 0 for none
) -> int:
    """Returns the first segment whose entries do not fit into its pages (then nothing is written), or -1."""
    N, T, reading = slots.shape[0], q.shape[0], entries.shape[0] > 0
    counts = np.zeros(N, np.int64)
    for s in range(N):
        if slots[s] != PADDING_SLOT:
            at = count_pool.offset + slots[s] * count_pool.slot_stride + depths[s] * count_pool.depth_stride
            counts[s] = np.int64(count_data[at])
    paged = max_pages > 0
    outgrown = _outgrown(counts, offsets, entries, max_pages * block) if paged else -1
    if outgrown >= 0:
        return outgrown

    segment, last, start = np.empty(T, np.int64), np.empty(T, np.int64), np.empty(T + 1, np.int64)
    _plan(counts, offsets, entries, limit, window, segment, last, start)
    token = np.empty(start[T], np.int64)
    for t in range(T):
        token[start[t] : start[t + 1]] = t
    sums = np.empty((start[T], q.shape[1], new_v.shape[2]), np.float32)
    norms = np.empty((start[T], q.shape[1], 2), np.float32)
    # Those that only read find everything in the cache.
    cached = counts + (2**62 if reading else 0)
    _read(
        q, new_k, new_v, k_cache, v_cache, block, tables, paged, slots, depths, offsets, cached,
        window, scale, softcap, segment, last, start, token, sums, norms,
    )  # fmt: skip
    _join(sums, norms, start, out)
    if reading:
        return -1
    _append(new_k, k_data, k_cache, block, tables, paged, slots, depths, offsets, counts, limit)
    _append(new_v, v_data, v_cache, block, tables, paged, slots, depths, offsets, counts, limit)
    for s in range(N):
        length = offsets[s + 1] - offsets[s]
        if slots[s] != PADDING_SLOT and length <= limit:
            at = count_pool.offset + slots[s] * count_pool.slot_stride + depths[s] * count_pool.depth_stride
            count_data[at] += np.float32(length)
    return -1


@numba.njit(cache=True, nogil=True)
def append_each_numba(
    new_k: Floats,  # [N, Hkv, D]
    new_v: Floats,  # [N, Hkv, Dv]
    k_data: Floats,  # the flat array of k_cache
    v_data: Floats,
    k_cache: FlatCache,
    v_cache: FlatCache,
    block: int,  # entries of a page
    tables: FlatPool,
    count_data: Floats,  # the flat array of count_pool
    count_pool: FlatPool,
    slots: Ints,  # [N]
    depths: Ints,  # [N]
) -> None:
    """One entry more for each (slot, depth), in pages that are there."""
    width_k, width_v = new_k.shape[1] * new_k.shape[2], new_v.shape[1] * new_v.shape[2]
    keys, values = new_k.reshape(new_k.size), new_v.reshape(new_v.size)
    for s in range(slots.shape[0]):
        at = count_pool.offset + slots[s] * count_pool.slot_stride + depths[s] * count_pool.depth_stride
        count = np.int64(count_data[at])
        to = _address(k_cache, width_k, block, tables, True, slots[s], depths[s], count)
        k_data[to : to + width_k] = keys[s * width_k : (s + 1) * width_k]
        to = _address(v_cache, width_v, block, tables, True, slots[s], depths[s], count)
        v_data[to : to + width_v] = values[s * width_v : (s + 1) * width_v]
        if slots[s] != PADDING_SLOT:
            count_data[at] = count + 1
