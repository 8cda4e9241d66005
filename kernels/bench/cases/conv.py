"""Causal convolutions. Their unit is a block of 64 channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.conv as op
import kernels.conv.ring as ring_op
from kernels.bench.case import Case, Rows, Trial, by_row, moved

CHANNELS = 64


def _short(rows: int, device: torch.device, *, H: int, W: int) -> Trial:
    at, C = Rows.of(rows, device), H * CHANNELS
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((rows, C), (C, W), (C,)))
    pool = at.pool(W - 1, C, device=device)
    expected = F.silu(by_row(lambda x, s: op.conv_naive(x, weight, bias, s), x, at.sampled(pool)))

    def torch_step() -> Tensor:
        seen = torch.cat([pool[at.slots, 0], x.unsqueeze(1)], 1)
        pool[at.slots, 0] = seen[:, 1:]
        return F.silu(torch.einsum("rwc,cw->rc", seen, weight) + bias)

    return Trial(
        lambda: op._on_gpu(x, weight, bias, pool, *at.index, True),
        expected,
        moved(pool, rows, x, x, weight, bias),
        None,
        torch_step,
    )


def _dilated(rows: int, device: torch.device, *, H: int, W: int, dilation: int) -> Trial:
    at, C = Rows.of(rows, device), H * CHANNELS
    x, weight = torch.randn(rows, C, device=device), torch.randn(C, W, device=device)
    pool = at.pool((W - 1) * dilation, C, device=device)
    cursor = at.pool(1, device=device, fill=0.0)
    expected = by_row(lambda x, s: op.conv_naive(x, weight, None, s, dilation), x, at.sampled(pool))
    touched = rows * C * W * 4  # W - 1 inputs read, one written: not the whole ring
    return Trial(
        lambda: ring_op._on_gpu(x, weight, None, pool, cursor, *at.index, dilation, False),
        expected,
        touched + sum(t.numel() * 4 for t in (x, x, weight)),
    )


CASES = (
    Case("conv/short", _short, {"H": 64, "W": 4}, {"H": 1, "W": 4}),
    Case("conv/dilated", _dilated, {"H": 16, "W": 4, "dilation": 16}, {"H": 1, "W": 3, "dilation": 2}),
)
