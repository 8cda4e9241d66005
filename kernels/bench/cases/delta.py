"""States under the delta rule, and diagonal plus low-rank transitions."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.delta as op
from kernels.bench.case import Case, Rows, Trial, by_row, fla, moved


def _delta(rows: int, device: torch.device, *, decay: str, H: int, K: int, V: int) -> Trial:
    at = Rows.of(rows, device)
    q, k, v = (torch.randn(rows, H, d, device=device) for d in (K, K, V))
    k, beta = F.normalize(k, dim=-1), torch.rand(rows, H, device=device)
    shape: dict[str, tuple[int, ...]] = {"head": (), "channel": (K,)}
    g = None if decay == "none" else -torch.rand(rows, H, *shape[decay], device=device)
    pool = at.pool(H, K, V, device=device)
    expected = by_row(partial(op.delta_naive, scale=1.0), q, k, v, beta, g, at.sampled(pool))
    fade = None if g is None else g.unsqueeze(-1) if decay == "channel" else g[..., None, None]

    def torch_step() -> Tensor:
        state = pool[at.slots, 0]
        if fade is not None:
            state = state * fade.exp()
        error = v - torch.einsum("rhk,rhkv->rhv", k, state)
        state = state + (beta.unsqueeze(-1) * k).unsqueeze(-1) * error.unsqueeze(-2)
        pool[at.slots, 0] = state
        return torch.einsum("rhk,rhkv->rhv", q, state)

    options: dict[str, Any] = {"beta": beta, "scale": 1.0, "initial_state": pool[1:, 0]}
    module, function = "delta_rule", "fused_recurrent_delta_rule"
    if g is not None:
        module, function = "gated_delta_rule", "fused_recurrent_gated_delta_rule"
        options["g" if decay == "head" else "gk"] = g
    return Trial(
        lambda: op._on_gpu(q, k, v, beta, g, None, None, pool, *at.index, 1.0),
        expected,
        moved(pool, rows, q, k, v, v, beta, g),
        fla(module, function, q, k, v, **options),
        torch_step,
    )


def _dplr(rows: int, device: torch.device, *, H: int, K: int, V: int) -> Trial:
    at = Rows.of(rows, device)
    q, k, v = (torch.randn(rows, H, d, device=device) for d in (K, K, V))
    w, kappa = -torch.rand(rows, H, K, device=device), F.normalize(torch.randn_like(k), dim=-1)
    a, b = -kappa, kappa * torch.rand(rows, H, K, device=device)
    pool = at.pool(H, K, V, device=device)
    expected = by_row(partial(op.dplr_naive, scale=1.0), q, w, k, v, a, b, at.sampled(pool))

    def torch_step() -> Tensor:
        state = pool[at.slots, 0]
        erased = b.unsqueeze(-1) * torch.einsum("rhk,rhkv->rhv", a, state).unsqueeze(-2)
        state = state * w.exp().unsqueeze(-1) + erased + k.unsqueeze(-1) * v.unsqueeze(-2)
        pool[at.slots, 0] = state
        return torch.einsum("rhk,rhkv->rhv", q, state)

    return Trial(
        lambda: op._on_gpu(q, k, v, None, w, a, b, pool, *at.index, 1.0),
        expected,
        moved(pool, rows, q, k, v, v, w, a, b),
        fla("rwkv7", "fused_recurrent_rwkv7", q, w, k, v, a, b, scale=1.0, initial_state=pool[1:, 0]),
        torch_step,
    )


def _case(name: str, decay: str, size: dict[str, int]) -> Case:
    return Case(name, partial(_delta, decay=decay), size, {"H": 2, "K": 6, "V": 5})


CASES = (
    _case("delta/deltanet", "none", {"H": 16, "K": 128, "V": 128}),
    _case("delta/gated_deltanet", "head", {"H": 32, "K": 128, "V": 128}),
    _case("delta/kda", "channel", {"H": 32, "K": 128, "V": 128}),
    Case("delta/rwkv7", _dplr, {"H": 32, "K": 64, "V": 64}, {"H": 2, "K": 6, "V": 5}),
)
