"""The cells over many tokens, in torch: packed, differentiable. They are non-linear, so there is no parallel
form: one step after the other, all segments at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import pad, unpad


def cell_scan(
    kind: str, wx: Tensor, R: Tensor, bias: Tensor | None, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed wx [T, G, H, D], R [G, H, D, D], bias [G, H, D], state [N, S, H, D] at the segments' starts,
    offsets [N + 1] -> h [T, H, D] and the states at the ends, float32."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    xs = pad(wx.float(), offsets, longest).transpose(0, 1)  # [L, N, G, H, D]
    R = R.float()
    outs = []
    state = state.float()
    for t in range(longest):
        r = torch.einsum("nhi,ghio->ngho", state[:, 0], R)
        if bias is not None:
            r = r + bias.float()
        after = torch.stack(update(kind, xs[t], r, state), 1)
        state = torch.where((t < lengths).view(-1, 1, 1, 1), after, state)
        outs.append(state[:, 0])
    if not outs:
        return wx.new_zeros(0, *wx.shape[2:], dtype=torch.float32), state
    return unpad(torch.stack(outs, 1), offsets), state


def update(kind: str, x: Tensor, r: Tensor, state: Tensor) -> list[Tensor]:
    """x, r [N, G, H, D], state [N, S, H, D] -> the new states, each [N, H, D]."""
    if kind == "elman":
        return [torch.tanh(x[:, 0] + r[:, 0])]
    if kind == "elman_relu":
        return [F.relu(x[:, 0] + r[:, 0])]
    if kind == "gru":
        reset, keep = torch.sigmoid(x[:, :2] + r[:, :2]).unbind(1)
        fresh = torch.tanh(x[:, 2] + reset * r[:, 2])
        return [torch.lerp(fresh, state[:, 0], keep)]
    i, f, z, o = (x + r).unbind(1)
    z, o = torch.tanh(z), torch.sigmoid(o)
    if kind == "lstm":
        c = torch.sigmoid(f) * state[:, 1] + torch.sigmoid(i) * z
        return [o * torch.tanh(c), c]
    c, n, m = state[:, 1], state[:, 2], state[:, 3]
    decayed = F.logsigmoid(f) + m
    # m cancels in c / n, and has no gradient. With n = 0, c and n vanish whatever their factor.
    peak = torch.where(n == 0, i, torch.maximum(decayed, i)).detach()
    write = torch.exp(i - peak)
    forget = torch.where(n == 0, 0.0, torch.exp(torch.where(n == 0, 0.0, decayed - peak)))
    c, n = forget * c + write * z, forget * n + write
    return [o * c / n, c, n, peak]
