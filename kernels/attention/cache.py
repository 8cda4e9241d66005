"""Where the entries (keys and values) of a sequence lie, in a ring or in pages.

    ring   k [slots, depths, R, Hkv, D]: entry e of (slot, depth) lies at e % R paged  k [pages, P, Hkv, D],
    tables [slots, depths, max_pages]: entry e lies in page tables[slot, depth, e // P],
           at e % P; page 0 belongs to padding

``count`` [slots, depths, 1] says how many entries (slot, depth) has had, as float32 like every state, exact
below 2^24. The padding slot has none, ever: what padded rows append lands in its first entries and is not
counted.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.pool import PADDING_SLOT, array_of, as_float32, flat

Pair = tuple[Tensor, Tensor]


class FlatCache(NamedTuple):
    """A ring's or a page pool's storage as one flat array, for numba: see kernels.pool."""

    data: npt.NDArray[Any]  # float32; bfloat16 as uint16
    offset: int
    first_stride: int  # of a slot, or of a page
    second_stride: int  # of a depth, or of an entry in a page


def flat_cache(cache: Tensor) -> FlatCache:
    """The flat view of a tensor [.., .., *inner] whose inner dimensions are contiguous."""
    if cache.dtype is torch.float32:
        return FlatCache(*flat(cache))
    known: FlatCache | None = getattr(cache, "_fathom_flat", None)
    if known is None:
        if cache.dtype is not torch.bfloat16:
            raise ValueError(f"k, v: entries are stored as float32 or bfloat16, got {cache.dtype}")
        view = flat(cache.view(torch.int16))
        known = FlatCache(view.data.view(np.uint16), *view[1:])
        cache._fathom_flat = known  # type: ignore[attr-defined]
    return known


def count_of(count_pool: Tensor, slot: int, depth: int) -> int:
    return 0 if slot == PADDING_SLOT else int(count_pool[slot, depth, 0])


def gather(k: Tensor, v: Tensor, tables: Tensor | None, slot: int, depth: int, first: int, last: int) -> Pair:
    """Entries first .. last - 1 of (slot, depth): keys [E, Hkv, D], values [E, Hkv, Dv]."""
    at = torch.arange(first, last, device=k.device)
    if tables is None:
        at = at % k.shape[2]
        return k[slot, depth, at], v[slot, depth, at]
    size = k.shape[1]
    pages = tables[slot, depth, first // size : -(-last // size)]
    # Whole pages first: one run of memory each.
    inside = slice(first % size, first % size + last - first)
    return k[pages].flatten(0, 1)[inside], v[pages].flatten(0, 1)[inside]


def append_each(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    count_pool: Tensor,
    slots: Tensor,
    depths: Tensor,
) -> None:
    """Append one entry to each of several (slot, depth), all of them different, the padding slot aside: k [N, Hkv, D],
    v [N, Hkv, Dv], without waiting for the device."""
    if not k.is_cuda and k_pages.dtype is torch.float32:
        from kernels.attention.step_numba import append_each_numba

        flat_k, flat_v, flat_count = flat_cache(k_pages), flat_cache(v_pages), flat(count_pool)
        append_each_numba(
            as_float32(k), as_float32(v), flat_k.data, flat_v.data, flat_k, flat_v, k_pages.shape[1], flat(tables),
            flat_count.data, flat_count, array_of(slots), array_of(depths),
        )  # fmt: skip
        return
    count = count_pool[slots, depths, 0]
    at = count.long()
    pages, inside = tables[slots, depths, at // k_pages.shape[1]], at % k_pages.shape[1]
    k_pages[pages, inside], v_pages[pages, inside] = k.to(k_pages.dtype), v.to(v_pages.dtype)
    count_pool[slots, depths, 0] = count + (slots != PADDING_SLOT)


def append(
    k: Tensor,
    v: Tensor,
    tables: Tensor | None,
    slot: int,
    depth: int,
    first: int,
    new_k: Tensor,
    new_v: Tensor,
) -> None:
    """Write entries first, first + 1, ... of (slot, depth): new_k [T, Hkv, D], new_v [T, Hkv, Dv]."""
    if tables is None:
        kept = min(new_k.shape[0], k.shape[2])
        last = first + new_k.shape[0]
        at = torch.arange(last - kept, last, device=k.device) % k.shape[2]
        k[slot, depth, at] = new_k[new_k.shape[0] - kept :].to(k.dtype)
        v[slot, depth, at] = new_v[new_v.shape[0] - kept :].to(v.dtype)
        return
    at = torch.arange(first, first + new_k.shape[0], device=k.device)
    pages, inside = tables[slot, depth, at // k.shape[1]], at % k.shape[1]
    k[pages, inside] = new_k.to(k.dtype)
    v[pages, inside] = new_v.to(v.dtype)
