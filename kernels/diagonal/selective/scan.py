"""The selective scan over many tokens: packed, differentiable, in chunks that bound the memory of the
states."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.diagonal.recurrence import recurrence
from kernels.packing import pad, unpad

CHUNK = 64


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Packed x, dt, z [T, C], B, C [T, N]; A [N, C], D [C]; state [S, N, C] at the start of each of the S
    segments; offsets [S + 1]. Returns y [T, C] and the states at the ends, float32."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    # Padding has dt = 0, which leaves the state as it is.
    xs, dts, Bs, Cs = (pad(i.float(), offsets, longest) for i in (x, dt, B, C))
    state = state.float()
    outs = [xs[:, :0]]
    for start in range(0, longest, CHUNK):
        x_c, dt_c, B_c, C_c = (i[:, start : start + CHUNK] for i in (xs, dts, Bs, Cs))
        decay = (dt_c[:, :, None] * A.float()).exp()  # [S, L, N, C]
        h = recurrence(decay, B_c[..., None] * (dt_c * x_c)[:, :, None], state)
        outs.append(torch.einsum("sln,slnc->slc", C_c, h))
        state = h[:, -1]
    y = unpad(torch.cat(outs, 1), offsets)
    if D is not None:
        y = y + D.float() * x.float()
    return y if z is None else y * F.silu(z.float()), state
