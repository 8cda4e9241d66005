"""The operations of adaptive depth as they are written on paper."""

from collections.abc import Sequence

import torch
from torch import Tensor


def depth_lora_naive(x: Tensor, A: Tensor, B: Tensor, depths: Tensor, sizes: Sequence[int]) -> Tensor:
    """x [T, in], A [depths, parts, r, in], B [depths, out, r], depths [T] -> [T, out]: y_t = B_d A_d x_t (arXiv
    2410.20672, eq. 2), one token at a time, for each of the parts of `sizes` that the outputs are cut into."""
    rows = []
    for t, d in enumerate(depths.tolist()):
        blocks = B[d].split(list(sizes))
        rows.append(torch.cat([block @ (A[d, part] @ x[t]) for part, block in enumerate(blocks)]))
    return torch.stack(rows)


def compact_naive(keys: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """keys [T] from 0 to groups - 1 -> (order [T]: the tokens of group 0, those of group 1, ..., each rising; bounds
    [groups + 1] of the groups in it)."""
    order = [t for group in range(groups) for t, key in enumerate(keys.tolist()) if key == group]
    counts = [int((keys == group).sum()) for group in range(groups)]
    return torch.tensor(order, dtype=torch.int64), torch.tensor([0, *counts]).cumsum(0)


def confidence_naive(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """What a head says of normed hidden vectors: x [T, D], weight [V, D], bias [V] -> [T, 4] float32: the largest
    probability, its lead on the second largest, the entropy in nats, and the likeliest token."""
    logits = torch.nn.functional.linear(x, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    p = logits.softmax(-1)
    top, at = p.topk(min(2, p.shape[-1]))
    lead = top[:, 0] - (top[:, 1] if top.shape[-1] > 1 else 0)
    entropy = -(p * p.clamp_min(1e-38).log()).sum(-1)
    return torch.stack([top[:, 0], lead, entropy, at[:, 0].float()], -1)
