"""Non-linear cells. Their matrices are shared by all rows and count once."""

from functools import partial

import torch
from torch import Tensor

import kernels.cell as op
from kernels.bench.case import Case, Rows, Trial, by_row, moved
from kernels.cell.scan import update


def _cell(rows: int, device: torch.device, *, kind: str, H: int, D: int) -> Trial:
    at, form = Rows.of(rows, device), op.KINDS[kind]
    wx = torch.randn(rows, len(form.gates), H, D, device=device)
    R = torch.randn(len(form.gates), H, D, D, device=device) * D**-0.5
    bias = torch.randn(len(form.gates), H, D, device=device)
    pool = at.pool(len(form.states), H, D, device=device)
    if kind == "slstm":
        pool[:, :, 2] = pool[:, :, 2].abs() + 1
    expected = by_row(lambda wx, s: op.cell_naive(kind, wx, R, bias, s), wx, at.sampled(pool))

    def torch_step() -> Tensor:
        state = pool[at.slots, 0]
        after = torch.stack(update(kind, wx, torch.einsum("rhi,ghio->rgho", state[:, 0], R) + bias, state), 1)
        pool[at.slots, 0] = after
        return after[:, 0]

    return Trial(
        lambda: op._on_gpu(wx, R, bias, pool, *at.index, kind),
        expected,
        moved(pool, rows, wx, R, bias, wx[:, 0]),
        None,
        torch_step,
    )


def _case(name: str, kind: str, H: int, D: int, small: int = 5) -> Case:
    return Case(name, partial(_cell, kind=kind), {"H": H, "D": D}, {"H": 2, "D": small})


CASES = (
    _case("cell/lstm", "lstm", 12, 64),
    _case("cell/gru", "gru", 12, 64),
    _case("cell/slstm", "slstm", 12, 64),
    _case("cell/slstm_wide", "slstm", 4, 256, small=66),
    _case("cell/lstm_one_head", "lstm", 1, 1024, small=66),
)
