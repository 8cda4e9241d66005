"""The selective scan of Mamba (arXiv 2312.00752, algorithm 2), one token at a time.

h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t      h: [N, C]
y_t = C_t . h_t + D x_t,  then  y_t silu(z_t)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_naive(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence: x, dt, z [T, C], A [N, C], B, C [T, N], D [C], state [N, C] -> y [T, C], the final state.

    dt is the step size itself, after bias and softplus.
    """
    out = torch.empty_like(x)
    for t in range(x.shape[0]):
        state = (dt[t] * A).exp() * state + B[t][:, None] * (dt[t] * x[t])
        y = C[t] @ state
        if D is not None:
            y = y + D * x[t]
        out[t] = y if z is None else y * F.silu(z[t])
    return out, state
