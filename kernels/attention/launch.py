"""Launching the Triton kernels of attention."""

import torch
import triton
from torch import Tensor

from kernels.attention.step_triton import attention_append_kernel, attention_read_kernel


def launch(
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
    """Shapes as in kernels.attention; T tokens in N segments, without a look at any number on the device."""
    T, Hq, D = q.shape
    N, Hkv, Dv = slots.shape[0], k_cache.shape[-2], v_cache.shape[-1]
    out = q.new_empty(T, Hq, Dv)
    if N == 0:
        return out
    if k is None or v is None:
        new_k = new_v = k_cache
    else:
        new_k, new_v = k.to(k_cache.dtype).contiguous(), v.to(v_cache.dtype).contiguous()
    counts = torch.empty(N, dtype=torch.int64, device=q.device)
    paged = tables is not None
    table = slots if tables is None else tables
    strides = (
        k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
        *((0, 0, 0) if tables is None else (tables.stride(0), tables.stride(1), tables.shape[2])),
        count_pool.stride(0), count_pool.stride(1), k_cache.shape[1] if paged else k_cache.shape[2],
    )  # fmt: skip
    group = triton.next_power_of_2(Hq // Hkv)
    # Where every segment has a token, none has more than this; programs stride on where one has.
    longest = max(1, T - N + 1)
    tokens = 1 if longest == 1 else max(1, 16 // group)
    attention_read_kernel[(N, Hkv, min(64, triton.cdiv(longest, tokens)))](
        q.contiguous(), new_k, new_v, k_cache, v_cache, table, count_pool,
        slots if entries is None else entries, slots, depths, offsets, counts, out,
        scale, softcap or 0.0, 1 << 40 if window is None else window, *strides,
        HKV=Hkv, G=Hq // Hkv, D=D, DV=Dv, GROUP=group, TOKENS=tokens, **blocks(D, Dv, k_cache.dtype),
        PAGED=paged, APPEND=k is not None, SOFTCAP=softcap is not None,
    )  # fmt: skip
    if k is not None:
        attention_append_kernel[(N, min(64, longest))](
            new_k, new_v, k_cache, v_cache, table, count_pool, slots, depths, offsets, counts, *strides,
            WIDTH_K=Hkv * D, WIDTH_V=Hkv * Dv, PAGED=paged, num_warps=4,
        )  # fmt: skip
    return out


def blocks(D: int, Dv: int, stored: torch.dtype) -> dict[str, int]:
    """Tile sizes: fewer entries at a time where they are wide. 16 is the least that a matrix product takes.

    A float32 product runs as three of tf32, whose operands take twice the registers of the numbers
    themselves.
    """
    block_d, block_v = max(16, triton.next_power_of_2(D)), max(16, triton.next_power_of_2(Dv))
    widest = max(block_d, block_v)
    if stored is torch.float32:
        entries, warps = 32 if widest <= 128 else 16, 4 if widest <= 64 else 8
    else:
        entries, warps = 64 if widest <= 64 else 32, 4
    return {"BLOCK_N": entries, "BLOCK_D": block_d, "BLOCK_V": block_v, "num_warps": warps}
