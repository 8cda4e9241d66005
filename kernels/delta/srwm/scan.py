"""The self-referential weight matrix over many tokens: packed, differentiable, all segments and heads at
once.

Its update is not linear in its state, so there is no parallel form over time: this is a loop over the tokens.
"""

import torch
from torch import Tensor

from kernels.packing import pad, unpad


def srwm_scan(x: Tensor, weight: Tensor, state: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed x [T, H, D], weight [H, D, R]; state [N, H, D, R] at the start of each of the N segments;
    offsets [N + 1]. Returns y [T, H, E], E = R - 2 D - 4, and the states at the ends, float32."""
    H, D, R = weight.shape
    sizes = [R - 2 * D - 4, D, D, 4]
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    xs = pad(x.float(), offsets, longest)  # [N, L, H, D]
    alive = torch.arange(longest, device=x.device) < lengths[:, None]
    block = torch.arange(4, device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))  # [R]
    state, outs = state.float(), []
    for t in range(longest):
        W = weight.float() + state
        y, q, k, beta = torch.einsum("nhd,nhdr->nhr", xs[:, t], W).split(sizes, -1)
        q, k = q.softmax(-1), k.softmax(-1)
        change = beta.sigmoid()[..., block] * torch.einsum("nhd,nhdr->nhr", q - k, W)
        state = state + (k * alive[:, t, None, None])[..., None] * change[..., None, :]
        outs.append(y)
    if not outs:
        return x.new_zeros(0, H, sizes[0], dtype=torch.float32), state
    return unpad(torch.stack(outs, 1), offsets), state
