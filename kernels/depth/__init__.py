"""Operations of adaptive depth: low-rank updates by depth, routing with compaction, and the confidence of a prediction
without its logits."""

import functools
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kernels.depth.naive import compact_naive, confidence_naive, depth_lora_naive
from kernels.depth.step_numba import compact_numba, confidence_numba, depth_lora_numba
from kernels.library import define
from kernels.pool import array_of, as_float32

__all__ = [
    "compact", "compact_naive", "confidence", "confidence_naive", "confidence_of", "depth_lora",
    "depth_lora_naive", "depth_lora_step",
]  # fmt: skip

SPLIT = 4096
"""Logits that one program of a GPU looks at: a vocabulary of 128 k makes 32 programs for each block of tokens."""


def depth_lora(x: Tensor, A: Tensor, B: Tensor, depths: Tensor, sizes: Sequence[int]) -> Tensor:
    """x [T, in], A [depths, parts, r, in], B [depths, out, r], depths [T] -> [T, out]: y_t = B_d A_d x_t for the depth
    d of token t, for each of the parts of `sizes` that the outputs are cut into. Differentiable where any of them
    asks for a gradient."""
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _train(x, A, B, depths, sizes)
    return cast("Tensor", depth_lora_step(x, A, B, depths, list(sizes)))


def _train(x: Tensor, A: Tensor, B: Tensor, depths: Tensor, sizes: Sequence[int]) -> Tensor:
    """Two matrix products over the factors of all depths at once, in which a token keeps only the columns of its
    own."""
    count, parts, rank, _ = A.shape
    own = torch.nn.functional.one_hot(depths, count).to(x.dtype)[..., None, None]
    low = torch.nn.functional.linear(x, A.flatten(0, 2)).unflatten(-1, (count, parts, rank)) * own
    pieces = zip(low.unbind(2), B.split(list(sizes), 1), strict=True)  # [T, depths, r], [depths, size, r]
    return torch.cat([part.flatten(1) @ block.transpose(1, 2).flatten(0, 1) for part, block in pieces], -1)


@functools.cache
def _bounds(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes], device=device).cumsum(0)


def _lora_on_cpu(x: Tensor, A: Tensor, B: Tensor, depths: Tensor, sizes: list[int]) -> Tensor:
    out = np.empty((x.shape[0], B.shape[1]), np.float32)
    bounds = _bounds(tuple(sizes), x.device).numpy()
    depth_lora_numba(as_float32(x), as_float32(A), as_float32(B), array_of(depths), bounds, out)
    return torch.from_numpy(out).to(x.dtype)


def _lora_on_gpu(x: Tensor, A: Tensor, B: Tensor, depths: Tensor, sizes: list[int]) -> Tensor:
    import triton

    from kernels.depth.step_triton import depth_lora_kernel

    x, A, B = x.contiguous(), A.contiguous(), B.contiguous()
    (T, inputs), (_, outputs, rank), parts = x.shape, B.shape, A.shape[1]
    out = x.new_empty(T, outputs)
    block_r = triton.next_power_of_2(rank)
    wide = max(16, 4096 // block_r)  # elements of a factor in the registers of one program
    if T:
        depth_lora_kernel[(T, parts)](
            x, A, B, depths, _bounds(tuple(sizes), x.device), out,
            IN=inputs, OUT=outputs, PARTS=parts, R=rank, BLOCK_R=block_r,
            BLOCK_I=min(triton.next_power_of_2(inputs), wide),
            BLOCK_O=min(triton.next_power_of_2(max(sizes)), wide), num_warps=4,
        )  # fmt: skip
    return out


depth_lora_step = define(
    "depth_lora(Tensor x, Tensor A, Tensor B, Tensor depths, int[] sizes) -> Tensor",
    cpu=_lora_on_cpu,
    gpu=_lora_on_gpu,
    fake=lambda x, A, B, depths, sizes: x.new_empty(x.shape[0], B.shape[1]),
)


def _compact_on_cpu(keys: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    order, bounds = np.empty(len(keys), np.int64), np.empty(groups + 1, np.int64)
    compact_numba(keys.numpy(), order, bounds)
    return torch.from_numpy(order), torch.from_numpy(bounds)


def _compact_on_gpu(keys: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    import triton

    from kernels.depth.step_triton import compact_kernel

    order, bounds = torch.empty_like(keys), keys.new_empty(groups + 1)
    block = min(1024, triton.next_power_of_2(max(16, len(keys))))
    compact_kernel[(1,)](keys, order, bounds, len(keys), GROUPS=groups, BLOCK=block, num_warps=4)
    return order, bounds


compact = define(
    "compact(Tensor keys, int groups) -> (Tensor, Tensor)",
    cpu=_compact_on_cpu,
    gpu=_compact_on_gpu,
    fake=lambda keys, groups: (torch.empty_like(keys), keys.new_empty(groups + 1)),
)
"""keys [T] int64 from 0 to groups - 1 -> (order [T]: the tokens of group 0, those of group 1, ..., each rising; bounds
[groups + 1] of the groups in it). Without waiting for the device."""


def _confidence_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(x, weight, bias).float()
    return confidence_of(logits if softcap is None else softcap * torch.tanh(logits / softcap))


def confidence_of(logits: Tensor) -> Tensor:
    """`confidence` where the logits [T, V] are there, on a CPU."""
    rows, out = as_float32(logits), np.empty((len(logits), 4), np.float32)
    confidence_numba(rows, rows.argmax(-1), out)
    return torch.from_numpy(out)


def _confidence_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    import triton

    from kernels.depth.step_triton import confidence_kernel

    x, weight = x.to(weight.dtype).contiguous(), weight.contiguous()
    (T, D), V = x.shape, weight.shape[0]
    splits = triton.cdiv(V, SPLIT)
    stats = torch.empty(T, splits, 4, dtype=torch.float32, device=x.device)
    likeliest = torch.empty(T, splits, dtype=torch.int64, device=x.device)
    if T:
        confidence_kernel[(triton.cdiv(T, 16), splits)](
            x, weight, weight if bias is None else bias, stats, likeliest, softcap or 0.0, T, V,
            D=D, SPLIT=SPLIT, BIAS=bias is not None, SOFTCAP=softcap is not None, BLOCK_T=16, BLOCK_V=64,
            BLOCK_D=min(64, max(16, triton.next_power_of_2(D))), num_warps=4,
        )  # fmt: skip
    (largest, second, total, weighted), at = _joined(stats, likeliest)
    probability = 1 / total
    lead = probability * (1 - (second - largest).exp())
    entropy = largest + total.log() - weighted / total
    return torch.stack([probability, lead, entropy.clamp_min(0), at.float()], -1)


def _joined(stats: Tensor, likeliest: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of the parts of the vocabulary, [T, splits, 4] and [T, splits] -> of all of it, four [T], and [T]."""
    largest, at = stats[..., 0].max(-1, keepdim=True)
    others = stats[..., 0].scatter(1, at, float("-inf")).amax(-1, keepdim=True)
    second = torch.maximum(others, stats[..., 1].gather(1, at))
    shrunk = (stats[..., 0] - largest).exp()
    sums = (stats[..., 2:] * shrunk[..., None]).sum(1)
    return (largest[:, 0], second[:, 0], *sums.unbind(-1)), likeliest.gather(1, at)[:, 0]


confidence = define(
    "confidence(Tensor x, Tensor weight, Tensor? bias, float? softcap) -> Tensor",
    cpu=_confidence_on_cpu,
    gpu=_confidence_on_gpu,
    fake=lambda x, weight, bias, softcap: x.new_empty(x.shape[0], 4, dtype=torch.float32),
)
"""Normed hidden vectors x [T, D], a head's weight [V, D] and bias [V] -> [T, 4] float32: the largest probability, its
lead on the second largest, the entropy in nats, and the likeliest token (exact to 2^24). On a GPU the logits are
never all there."""
