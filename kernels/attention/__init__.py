"""Softmax attention with state: a ring of the last entries (sliding window) or pages of all of them.

Every (slot, depth) has entries and a count of its own, so one launch serves rows at different depths. Two
ways:

- with k and v, a segment's tokens become entries count, count + 1, ...; each sees its own entry and those
before it;
  the count moves on;
- without them (None), nothing is written: each token sees the entries up to `entries` [T], which some earlier
call
  wrote. So rows at later depths reuse what was stored at the first (recursive KV sharing): `depths` then
  names the depth that was written, and `entries` are the tokens' positions.

Tokens of one segment must rise in `entries`; one (slot, depth) must not stand in two segments, the padding
slot aside.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.attention.cache import append, count_of, flat_cache, gather
from kernels.attention.naive import attention_naive
from kernels.attention.scan import attend, attention_scan
from kernels.attention.step_numba import attention_step_numba
from kernels.library import define
from kernels.pool import PADDING_SLOT, FlatPool, array_of, as_float32, flat

__all__ = ["attention_naive", "attention_paged", "attention_ring", "attention_scan", "attention_step"]

LONG = 16
"""Tokens of a segment from which matrix products over gathered entries beat the step kernels."""

_NO_TABLES = FlatPool(np.zeros(0, np.int64), 0, 0, 0)
_NO_ENTRIES = np.zeros(0, np.int64)
_EVERYTHING = 1 << 40


def attention_ring(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_pool: Tensor | None,
    v_pool: Tensor | None,
    count_pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    entries: Tensor | None = None,
) -> Tensor:
    """Packed q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> o [T, Hq, Dv], over the last `window` entries.

    Pools: k [slots, depths, R, Hkv, D], v [slots, depths, R, Hkv, Dv], count [slots, depths, 1], all float32.
    The window is R where it is not given. To read only (k and v None), the entries seen must still be in the
    ring: entry e needs e - window + 1 >= count - R, so R = window + the longest segment - 1. Without pools:
    from an empty state, differentiable (training), with the window that is given.
    """
    if k_pool is None or v_pool is None or count_pool is None:
        return _train(q, k, v, offsets, scale, softcap, window)
    ring = k_pool.shape[2]
    if window is not None and window > ring:
        raise ValueError(f"window: {window} is more than the {ring} entries of the ring")
    _check_way(k, v, entries)
    return attention_step(
        q, k, v, k_pool, v_pool, None, count_pool, slots, depths, offsets, entries,
        scale, softcap, window or ring,
    )  # fmt: skip


def attention_paged(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_pages: Tensor | None,
    v_pages: Tensor | None,
    tables: Tensor | None,
    count_pool: Tensor | None,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    entries: Tensor | None = None,
) -> Tensor:
    """Packed q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> o [T, Hq, Dv], over all entries, or the last
    `window`.

    Pages: k [pages, P, Hkv, D], v [pages, P, Hkv, Dv], float32 or bfloat16; tables [slots, depths, max_pages]
    int64 say which; count [slots, depths, 1] float32. The pages of the new entries must be in the tables; on
    a CPU an IndexError says where a segment outgrows its table, on a GPU what has no room is dropped. Without
    pages: from an empty state, differentiable (training).
    """
    if k_pages is None or v_pages is None or count_pool is None or tables is None:
        return _train(q, k, v, offsets, scale, softcap, window)
    _check_way(k, v, entries)
    return attention_step(
        q, k, v, k_pages, v_pages, tables, count_pool, slots, depths, offsets, entries, scale, softcap, window
    )  # fmt: skip


def _check_way(k: Tensor | None, v: Tensor | None, entries: Tensor | None) -> None:
    if (k is None) != (v is None) or (k is None) == (entries is None):
        raise ValueError("entries: given if, and only if, k and v are None (to read without appending)")


def _train(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    offsets: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    if k is None or v is None:
        raise ValueError("k, v: needed where there is no pool to read from")
    return attention_scan(q, k, v, None, offsets, scale, softcap, window)[0].to(q.dtype)


def _long_segments(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor | None,
    count_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    entries: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    which: list[int],
    out: Tensor,
) -> None:
    """Segments `which` as matrix products over their gathered entries; into `out`, cache and counts."""
    bounds, slot_of, depth_of = offsets.tolist(), slots.tolist(), depths.tolist()
    dtype = q.dtype if q.is_cuda else torch.float32
    for n in which:
        a, b, slot, depth = bounds[n], bounds[n + 1], slot_of[n], depth_of[n]
        count = count_of(count_pool, slot, depth)
        if entries is None:
            last = torch.arange(count, count + b - a, device=q.device)
            first, end = max(0, count - window + 1) if window else 0, count
        else:
            last = entries[a:b]
            first, end = max(0, int(last[0]) - window + 1) if window else 0, int(last[-1]) + 1
        keys, values = (x.to(dtype) for x in gather(k_cache, v_cache, tables, slot, depth, first, end))
        if k is not None and v is not None:
            # What is seen now is what will be read later: rounded as it is stored.
            new_k, new_v = k[a:b].to(k_cache.dtype), v[a:b].to(v_cache.dtype)
            append(k_cache, v_cache, tables, slot, depth, count, new_k, new_v)
            keys, values = torch.cat([keys, new_k.to(dtype)]), torch.cat([values, new_v.to(dtype)])
            if slot != PADDING_SLOT:
                count_pool[slot, depth, 0] = count + b - a
        out[a:b] = attend(q[a:b].to(dtype), keys, values, last - first, scale, softcap, window)


def _on_cpu(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor | None,
    count_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    entries: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    out = np.empty((q.shape[0], q.shape[1], v_cache.shape[-1]), np.float32)
    flat_k, flat_v, flat_count = flat_cache(k_cache), flat_cache(v_cache), flat(count_pool)
    bounds = array_of(offsets)
    outgrown = attention_step_numba(
        as_float32(q),
        _stored(k, k_cache),
        _stored(v, v_cache),
        _NO_ENTRIES if entries is None else entries.numpy(),
        flat_k.data,
        flat_v.data,
        flat_k,
        flat_v,
        k_cache.shape[2] if tables is None else k_cache.shape[1],
        _NO_TABLES if tables is None else flat(tables),
        0 if tables is None else tables.shape[2],
        flat_count.data,
        flat_count,
        array_of(slots),
        array_of(depths),
        bounds,
        out,
        window or _EVERYTHING,
        LONG - 1,
        np.float32(scale),
        np.float32(softcap or 0.0),
    )
    if outgrown >= 0 and tables is not None:
        raise IndexError(
            f"tables: segment {outgrown} (slot {int(slots[outgrown])}) needs more than the "
            f"{tables.shape[2]} pages of {k_cache.shape[1]} entries in its table"
        )
    result = torch.from_numpy(out)
    if q.shape[0] >= LONG:
        which = np.flatnonzero(np.diff(bounds) >= LONG).tolist()
        _long_segments(
            q, k, v, k_cache, v_cache, tables, count_pool, slots, depths, offsets, entries,
            scale, softcap, window, which, result,
        )  # fmt: skip
    return result.to(q.dtype)


def _stored(x: Tensor | None, cache: Tensor) -> np.ndarray[Any, Any]:
    """k or v [T, Hkv, D] in the cache's own numbers; empty [0, Hkv, D] for None."""
    if x is None:
        shape = (0, *cache.shape[-2:])
        return np.zeros(shape, np.float32 if cache.dtype is torch.float32 else np.uint16)
    if cache.dtype is torch.float32:
        return as_float32(x)
    return x.to(cache.dtype).contiguous().view(torch.int16).numpy().view(np.uint16)


def _on_gpu(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor | None,
    count_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    entries: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    from kernels.attention.launch import launch

    if q.is_cuda and q.shape[0] >= LONG * slots.shape[0]:  # a prefill: worth reading the counts back
        out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])
        _long_segments(
            q, k, v, k_cache, v_cache, tables, count_pool, slots, depths, offsets, entries,
            scale, softcap, window, list(range(slots.shape[0])), out,
        )  # fmt: skip
        return out
    return launch(
        q, k, v, k_cache, v_cache, tables, count_pool, slots, depths, offsets, entries, scale, softcap, window
    )  # fmt: skip


def _shape_only(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor | None,
    count_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
    offsets: Tensor,
    entries: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])


attention_step = define(
    "attention_step(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? tables, "
    "Tensor(c!) count_pool, Tensor slots, Tensor depths, Tensor offsets, Tensor? entries, float scale, "
    "float? softcap, int? window) -> Tensor",
    cpu=_on_cpu,
    gpu=_on_gpu,
    fake=_shape_only,
)
