"""Attention at a fixed number of entries. H counts key heads; keys and values are read, one of each
written."""

from functools import partial

import torch
from torch import Tensor

import kernels.attention as op
from kernels.attention.cache import gather
from kernels.bench.case import SAMPLE, TOLERANCE, Case, Rows, Trial

PAGE = 64


def _attention(
    rows: int, device: torch.device, *, paged: bool, H: int, G: int, D: int, entries: int
) -> Trial:
    """With a full ring of `entries`, or `entries` in pages (of bfloat16 on a GPU; the interpreter has no
    products of those)."""
    at, scale, window = Rows.of(rows, device), D**-0.5, None if paged else entries
    q, k, v = (torch.randn(rows, h, D, device=device) for h in (H * G, H, H))
    count = at.pool(1, device=device, fill=float(entries))
    tables = None
    if paged:
        need = -(-entries // PAGE) + 1
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        k_cache, v_cache = (
            torch.randn(1 + (rows + 1) * need, PAGE, H, D, device=device, dtype=dtype) for _ in range(2)
        )
        tables = (torch.randperm((rows + 1) * need, device=device) + 1).view(rows + 1, 1, need)
        tables[0] = 0
    else:
        k_cache, v_cache = at.pool(entries, H, D, device=device), at.pool(entries, H, D, device=device)
    k, v = k.to(k_cache.dtype).float(), v.to(v_cache.dtype).float()

    outs = []
    for n in range(min(SAMPLE, rows)):
        keys, values = gather(k_cache, v_cache, tables, int(at.slots[n]), 0, 0, entries)
        token = q[n : n + 1].cpu(), k[n : n + 1].cpu(), v[n : n + 1].cpu()
        past = keys.float().cpu(), values.float().cpu()
        outs.append(
            op.attention_naive(token[0], token[1], token[2], past[0], past[1], scale, None, window)[0]
        )

    def step() -> Tensor:
        count.fill_(float(entries))  # every call appends in the same place
        return op._on_gpu(
            q, k, v, k_cache, v_cache, tables, count, *at.index, None, scale, None, window
        )  # fmt: skip

    return Trial(
        step,
        torch.cat(outs).to(device),
        2 * rows * (entries + 1) * H * D * k_cache.element_size() + 4 * (2 * q.numel() + 2 * k.numel()),
        tolerance=1e-2
        if k_cache.dtype is torch.bfloat16
        else TOLERANCE,  # queries and weights are rounded as well
    )


def _case(name: str, paged: bool, size: dict[str, int]) -> Case:
    small = {"H": 2, "G": 2, "D": 5, "entries": 70 if paged else 6}
    return Case(name, partial(_attention, paged=paged), size, small)


CASES = (
    _case("attention/ring_2048", False, {"H": 1, "G": 10, "D": 256, "entries": 2048}),
    _case("attention/pages_1024", True, {"H": 8, "G": 4, "D": 128, "entries": 1024}),
)
