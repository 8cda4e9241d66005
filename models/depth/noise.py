"""Random vectors from (seed, position) alone, so that a token's start does not depend on batch, replica or restart."""

import math

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 that wraps."""

    def shifted(value: Tensor, by: int) -> Tensor:
        return (value >> by) & ((1 << (64 - by)) - 1)  # int64 has no logical shift

    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shifted(x, 31)


def uniform(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """seeds and positions [T], int64 -> [T, size] in (0, 1), float64."""
    at = _mix(seeds) ^ _mix(positions * 2 + 1)
    bits = _mix(at[:, None] + torch.arange(1, size + 1, device=seeds.device) * -0x61C8864680B583EB)
    return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def truncated_normal(seeds: Tensor, positions: Tensor, size: int, bound: float = 3.0) -> Tensor:
    """[T, size], standard normal within +- `bound`, float32."""
    tail = 0.5 * (1 + math.erf(-bound / math.sqrt(2)))
    u = tail + uniform(seeds, positions, size) * (1 - 2 * tail)
    return (math.sqrt(2) * torch.erfinv(2 * u - 1)).float()
