"""Recurrences through a dense matrix and a nonlinearity, one token and one head at a time.

With x_g the input's part of gate g (projected, with its bias) and r_g = R_g h_{t-1} + b_g:

    elman       h = tanh(x + r), or relu                                        Elman 1990 gru         r =
    sigmoid(x_r + r_r), z = sigmoid(x_z + r_z)                  arXiv 1406.1078, reset after the
                h = z h + (1 - z) tanh(x_n + r * r_n)                           product as in cuDNN and torch
    lstm        i, f, o = sigmoid, z = tanh;  c = f c + i z;  h = o tanh(c)     Hochreiter & Schmidhuber 1997
    slstm       m' = max(logsigmoid(f) + m, i), i' = exp(i - m'),               arXiv 2405.04517 eq. 8-18
                f' = exp(logsigmoid(f) + m - m');  z = tanh, o = sigmoid
                c = f' c + i' z;  n = f' n + i';  h = o c / n

sLSTM before its first token: all zeros. There n = 0, and m' = i (as if m were -inf), element by element;
afterwards n >= 1 unless it was made otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cell_naive(kind: str, wx: Tensor, R: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: input parts wx [T, G, H, D], R [G, H, D, D] (from, to), bias [G, H, D], state [S, H, D]
    -> h [T, H, D] and the final state. Gates and states in the order of kernels.cell.kinds."""
    state = state.clone()
    heads = wx.shape[2]
    out = wx.new_empty(wx.shape[0], *wx.shape[2:])
    for t in range(wx.shape[0]):
        for j in range(heads):
            x = wx[t, :, j]  # [G, D]
            r = torch.stack([state[0, j] @ R[g, j] for g in range(R.shape[0])])
            if bias is not None:
                r = r + bias[:, j]
            state[:, j] = torch.stack(_step(kind, x, r, state[:, j]))
            out[t, j] = state[0, j]
    return out, state


def _step(kind: str, x: Tensor, r: Tensor, state: Tensor) -> list[Tensor]:
    h = state[0]
    if kind in ("elman", "elman_relu"):
        return [torch.tanh(x[0] + r[0]) if kind == "elman" else F.relu(x[0] + r[0])]
    if kind == "gru":
        reset, keep = torch.sigmoid(x[0] + r[0]), torch.sigmoid(x[1] + r[1])
        return [keep * h + (1 - keep) * torch.tanh(x[2] + reset * r[2])]
    i, f, z, o = x + r
    if kind == "lstm":
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(z)
        return [torch.sigmoid(o) * torch.tanh(c), c]
    _, c, n, m = state
    decayed = F.logsigmoid(f) + m
    peak = torch.where(n == 0, i, torch.maximum(decayed, i))
    write, forget = torch.exp(i - peak), torch.exp(decayed - peak)
    c, n = (
        torch.where(n == 0, 0, forget * c) + write * torch.tanh(z),
        torch.where(n == 0, 0, forget * n) + write,
    )
    return [torch.sigmoid(o) * c / n, c, n, peak]
