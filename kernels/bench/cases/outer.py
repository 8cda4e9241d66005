"""Outer-product states."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels.outer as op
import kernels.outer.mlstm as mlstm_op
import kernels.outer.plstm as plstm_op
from kernels.bench.case import SAMPLE, Case, Rows, Trial, by_row, fla, moved

# Decay -> (shape of its gate for a state [K, V], module, function and argument of the same kernel in
# flash-linear-attention)
DECAYS = {
    "head": ("11", "simple_gla", "fused_recurrent_simple_gla", "g"),
    "channel": ("K1", "gla", "fused_recurrent_gla", "gk"),
    "bonus": ("K1", "rwkv6", "fused_recurrent_rwkv6", "w"),
    "value": ("1V", "gla", "fused_recurrent_gla", "gv"),
}


def _outer(rows: int, device: torch.device, *, decay: str, H: int, K: int, V: int) -> Trial:
    at = Rows.of(rows, device)
    q, k, v = (torch.randn(rows, H, d, device=device) for d in (K, K, V))
    form, module, function, gate = DECAYS[decay]
    shape = K if form[0] == "K" else 1, V if form[1] == "V" else 1
    factor = -torch.rand(rows, H, *shape, device=device)  # [rows, H, K or 1, V or 1], logarithms
    g = factor[..., 0, 0] if decay == "head" else factor.flatten(2)
    bonus = torch.randn(H, K, device=device) if decay == "bonus" else None
    by_value, pool = decay == "value", at.pool(H, K, V, device=device)
    naive = partial(op.outer_naive, scale=1.0, bonus=bonus, by_value=by_value)
    expected = by_row(naive, q, k, v, g, at.sampled(pool))

    def torch_step() -> Tensor:
        state, write = pool[at.slots, 0], k.unsqueeze(-1) * v.unsqueeze(-2)
        after = state * factor.exp() + write
        pool[at.slots, 0] = after
        seen = after if bonus is None else state + bonus.unsqueeze(-1) * write
        return torch.einsum("rhk,rhkv->rhv", q, seen)

    options: dict[str, Any] = {gate: g, "scale": 1.0, "initial_state": pool[1:, 0]}
    if bonus is not None:
        options["u"] = bonus
    return Trial(
        lambda: op._on_gpu(q, k, v, g, bonus, pool, *at.index, 1.0, by_value),
        expected,
        moved(pool, rows, q, k, v, v, g, bonus),
        fla(module, function, q, k, v, **options),
        torch_step,
    )


def _mlstm(rows: int, device: torch.device, *, H: int, K: int, V: int) -> Trial:
    at = Rows.of(rows, device)
    q, k, v = (torch.randn(rows, H, d, device=device) for d in (K, K, V))
    i, f = torch.randn(rows, H, device=device), torch.randn(rows, H, device=device) + 3
    C, n, m = at.pool(H, K, V, device=device), at.pool(H, K, device=device), at.pool(H, device=device)
    scale = K**-0.5
    states = [at.sampled(x) for x in (C, n, m)]
    naive = partial(mlstm_op.mlstm_naive, scale=scale)
    expected = by_row(
        lambda q, k, v, i, f, r: naive(q, k, v, i, f, (states[0][r], states[1][r], states[2][r])),
        q, k, v, i, f, torch.arange(SAMPLE),
    )  # fmt: skip

    def step() -> Tensor:
        qn, kn, g = mlstm_op._on_gpu(q, k, i, f, n, m, *at.index, scale, mlstm_op.EPS)
        return op._on_gpu(qn, kn, v, g, None, C, *at.index, 1.0)

    def torch_step() -> Tensor:
        before, m_before = torch.nn.functional.logsigmoid(f), m[at.slots, 0]
        m_new = torch.maximum(before + m_before, i)
        forget, write = (before + m_before - m_new).exp(), (i - m_new).exp()
        C_new = forget[..., None, None] * C[at.slots, 0] + (write[..., None] * k).unsqueeze(-1) * v.unsqueeze(
            -2
        )
        n_new = forget[..., None] * n[at.slots, 0] + write[..., None] * k
        C[at.slots, 0], n[at.slots, 0], m[at.slots, 0] = C_new, n_new, m_new
        read = torch.maximum((scale * (q * n_new).sum(-1)).abs(), (-m_new).exp()) + mlstm_op.EPS
        return scale * torch.einsum("rhk,rhkv->rhv", q, C_new) / read[..., None]

    size = moved(C, rows, q, k, v, v, i, f) + moved(n, rows) + moved(m, rows)
    return Trial(step, expected, size, None, torch_step)


def _plstm(rows: int, device: torch.device, *, H: int, J: int, K: int, V: int) -> Trial:
    at = Rows.of(rows, device)
    p, k = torch.randn(rows, H, J, J, K, device=device), torch.randn(rows, H, 1, K, device=device)
    w = torch.randn(rows, H, J, 1, V, device=device)
    transition = torch.linalg.qr(torch.randn(rows, H, J, J, device=device)).Q.contiguous()
    pool = at.pool(H, J, K, V, device=device)
    few = slice(0, min(SAMPLE, rows))
    one_each = torch.arange(few.stop + 1, device=device)
    expected, _ = plstm_op.plstm_scan(p[few], k[few], w[few], transition[few], at.sampled(pool), one_each)

    def torch_step() -> Tensor:
        state = pool[at.slots, 0]
        pool[at.slots, 0] = (
            torch.einsum("rhij,rhjkv->rhikv", transition, state) + k[:, :, None, 0, :, None] * w
        )
        return torch.einsum("rhyjk,rhjkv->rhyv", p, state)

    size = moved(pool, rows, p, k, w, transition, w)
    return Trial(
        lambda: plstm_op._on_gpu(p, k, w, transition, pool, *at.index), expected, size, None, torch_step
    )


def _case(name: str, decay: str, size: dict[str, int]) -> Case:
    return Case(name, partial(_outer, decay=decay), size, {"H": 2, "K": 6, "V": 5})


CASES = (
    _case("outer/mamba2", "head", {"H": 64, "K": 128, "V": 64}),
    _case("outer/gla", "channel", {"H": 4, "K": 256, "V": 512}),
    _case("outer/rwkv6", "bonus", {"H": 32, "K": 64, "V": 64}),
    _case("outer/gsa_keys", "value", {"H": 4, "K": 512, "V": 64}),
    Case("outer/mlstm", _mlstm, {"H": 8, "K": 256, "V": 512}, {"H": 2, "K": 6, "V": 5}),
    Case("outer/plstm", _plstm, {"H": 4, "J": 4, "K": 192, "V": 48}, {"H": 2, "J": 2, "K": 5, "V": 3}),
)
