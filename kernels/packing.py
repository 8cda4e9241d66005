"""Between packed tokens [T, ...] with segment offsets [N+1] and a padded batch [N, L, ...]."""

import torch
from torch import Tensor


def positions(offsets: Tensor, length: int) -> Tensor:
    """Where each packed token lies in the padded batch flattened to [N * L]."""
    lengths = offsets.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    within = torch.arange(len(segment), device=offsets.device) - offsets[:-1].repeat_interleave(lengths)
    return segment * length + within


def pad(x: Tensor, offsets: Tensor, length: int) -> Tensor:
    """[T, ...] -> [N, L, ...], zeros behind each segment's end."""
    n = len(offsets) - 1
    if n * length == x.shape[0]:
        return x.reshape(n, length, *x.shape[1:])
    out = x.new_zeros(n * length, *x.shape[1:])
    return out.index_copy(0, positions(offsets, length), x).view(n, length, *x.shape[1:])


def unpad(x: Tensor, offsets: Tensor) -> Tensor:
    """[N, L, ...] -> [T, ...]."""
    n, length = x.shape[:2]
    flat = x.reshape(n * length, *x.shape[2:])
    total = int(offsets[-1])
    if n * length == total:
        return flat
    return flat[positions(offsets, length)]
