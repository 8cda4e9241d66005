"""A low-rank update for each depth: y_t = B_d A_d x_t, with the depth d of token t."""

import torch
from torch import Tensor


def depth_lora_naive(x: Tensor, A: Tensor, B: Tensor, depths: Tensor) -> Tensor:
    """x [T, in], A [depths, r, in], B [depths, out, r], depths [T] -> [T, out]: one token at a time."""
    return torch.stack([B[d] @ (A[d] @ x[t]) for t, d in enumerate(depths.tolist())])


def depth_lora(x: Tensor, A: Tensor, B: Tensor, depths: Tensor) -> Tensor:
    """As `depth_lora_naive`, for tokens at any mix of depths: two matrix products over the factors of all depths at
    once, in which a token keeps only the r columns of its own. Differentiable."""
    count, rank, _ = A.shape
    low = torch.nn.functional.linear(x, A.flatten(0, 1)).unflatten(-1, (count, rank))  # [T, depths, r]
    own = torch.nn.functional.one_hot(depths, count).to(x.dtype)[..., None]
    return torch.nn.functional.linear((low * own).flatten(1), B.transpose(0, 1).flatten(1))
