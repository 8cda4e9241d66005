"""Diagonal states. Their unit is a block of 64 channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.diagonal.linear as linear_op
import kernels.diagonal.logsumexp as logsumexp_op
import kernels.diagonal.selective as selective_op
from kernels.bench.case import Case, Rows, Trial, by_row, fla, moved

CHANNELS = 64


def _selective(rows: int, device: torch.device, *, H: int, N: int) -> Trial:
    at, C = Rows.of(rows, device), H * CHANNELS
    x, z, dt = (torch.randn(rows, C, device=device) for _ in range(3))
    dt = dt.sigmoid()
    A, D = -torch.rand(N, C, device=device), torch.randn(C, device=device)
    B, read = torch.randn(rows, N, device=device), torch.randn(rows, N, device=device)
    pool = at.pool(N, C, device=device)
    expected = by_row(
        lambda x, dt, b, c, z, s: selective_op.selective_naive(x, dt, A, b, c, D, z, s), x, dt, B, read, z,
        at.sampled(pool),
    )  # fmt: skip

    def torch_step() -> Tensor:
        state = pool[at.slots, 0] * (dt.unsqueeze(1) * A).exp() + B.unsqueeze(-1) * (dt * x).unsqueeze(1)
        pool[at.slots, 0] = state
        return (torch.einsum("rn,rnc->rc", read, state) + D * x) * F.silu(z)

    return Trial(
        lambda: selective_op._on_gpu(x, dt, A, B, read, D, z, pool, *at.index),
        expected,
        moved(pool, rows, x, x, z, dt, A, B, read, D),
        None,
        torch_step,
    )


def _gated(rows: int, device: torch.device, *, H: int) -> Trial:
    at, C = Rows.of(rows, device), H * CHANNELS
    g, b = -torch.rand(rows, C, device=device), torch.randn(rows, C, device=device)
    pool = at.pool(C, device=device)
    expected = by_row(linear_op.gated_naive, g, b, at.sampled(pool))

    def torch_step() -> Tensor:
        state = pool[at.slots, 0] * g.exp() + b
        pool[at.slots, 0] = state
        return state

    return Trial(
        lambda: linear_op._on_gpu(b, g, None, None, pool, *at.index),
        expected,
        moved(pool, rows, g, b, b),
        fla("hgrn", "fused_recurrent_hgrn", b, g=g, initial_state=pool[1:, 0]),
        torch_step,
    )


def _s4d(rows: int, device: torch.device, *, H: int, N: int) -> Trial:
    at, C = Rows.of(rows, device), H * CHANNELS
    u, D = torch.randn(rows, C, device=device), torch.randn(C, device=device)
    lam, read = torch.rand(2, N, C, device=device) / 2, torch.randn(2, N, C, device=device)
    pool = at.pool(2, N, C, device=device)
    expected = by_row(lambda u, s: linear_op.s4d_naive(u, lam, read, D, s), u, at.sampled(pool))

    def torch_step() -> Tensor:
        re, im = pool[at.slots, 0].unbind(1)
        re, im = lam[0] * re - lam[1] * im + u.unsqueeze(1), lam[0] * im + lam[1] * re
        pool[at.slots, 0] = torch.stack([re, im], 1)
        return 2 * (read[0] * re - read[1] * im).sum(1) + D * u

    return Trial(
        lambda: linear_op._on_gpu(u, lam, read, D, pool, *at.index),
        expected,
        moved(pool, rows, u, u, lam, read, D),
        None,
        torch_step,
    )


def _aaren(rows: int, device: torch.device, *, H: int, V: int) -> Trial:
    at = Rows.of(rows, device)
    s, v = torch.randn(rows, H, device=device), torch.randn(rows, H, V, device=device)
    pool = at.pool(H * (V + 2), device=device)
    pool[..., H * V : H * (V + 1)].abs_().add_(1)  # denominators
    expected = by_row(logsumexp_op.aaren_naive, s, v, at.sampled(pool))

    def torch_step() -> Tensor:
        a, c, m = pool[at.slots, 0].split([H * V, H, H], -1)
        top = torch.maximum(m, s)
        old, new = (m - top).exp(), (s - top).exp()
        a = a.view(-1, H, V) * old.unsqueeze(-1) + v * new.unsqueeze(-1)
        c = c * old + new
        pool[at.slots, 0] = torch.cat([a.flatten(1), c, top], -1)
        return a / c.unsqueeze(-1)

    return Trial(
        lambda: logsumexp_op._on_gpu(s, v, None, None, pool, *at.index),
        expected,
        moved(pool, rows, s, v, v),
        None,
        torch_step,
    )


CASES = (
    Case("diagonal/mamba", _selective, {"H": 80, "N": 16}, {"H": 1, "N": 3}),
    Case("diagonal/hgrn", _gated, {"H": 32}, {"H": 1}),
    Case("diagonal/s4d", _s4d, {"H": 16, "N": 32}, {"H": 1, "N": 3}),
    Case("diagonal/aaren", _aaren, {"H": 8, "V": 64}, {"H": 2, "V": 5}),
)
