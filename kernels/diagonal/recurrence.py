"""h_t = a_t h_{t-1} + b_t for all t, differentiable, real or complex: what the scans of this folder are made
of."""

import math
from typing import Any

import torch
from torch import Tensor


def recurrence(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """a, b [N, L, ...] (a may be an expanded view), |a| <= 1, state [N, ...] before the first token -> h [N,
    L, ...].

    The gradient is the same recurrence from the end: with dh the gradient of h, d_t = dh_t + conj(a_{t+1})
    d_{t+1} is that of b_t, and d_t conj(h_{t-1}) that of a_t. So h is all that is kept, and no intermediate
    of the scan.
    """
    if b.shape[1] == 0:
        return b
    return _Recurrence.apply(a, b, state)


def ends(h: Tensor, state: Tensor, lengths: Tensor) -> Tensor:
    """The state [N, ...] after `lengths` [N] tokens, of h [N, L, ...] and the state before the first."""
    every = torch.cat([state[:, None], h], 1)
    return every[torch.arange(len(lengths), device=h.device), lengths]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        h = _solve(a, b, state)
        ctx.save_for_backward(a, h, state)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, state = ctx.saved_tensors
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).conj()
        d = _solve(later.flip(1), grads[0].flip(1), torch.zeros_like(state)).flip(1)
        before = torch.cat([state[:, None], h[:, :-1]], 1)
        return d * before.conj(), d, d[:, 0] * a[:, 0].conj()


def _solve(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """In blocks of sqrt(L) tokens: all blocks at once from zero, one token after the other; then from block
    to block, adding what the state at a block's beginning has become. 2 sqrt(L) steps, and three times the
    work of the loop."""
    length = b.shape[1]
    width = math.isqrt(length - 1) + 1
    short = -length % width
    if short:
        a = torch.cat([a, a.new_zeros(a.shape[0], short, *a.shape[2:])], 1)
        b = torch.cat([b, b.new_zeros(b.shape[0], short, *b.shape[2:])], 1)
    a, b = a.unflatten(1, (-1, width)), b.unflatten(1, (-1, width))  # [N, blocks, width, ...]
    h, decay = torch.empty_like(b), torch.empty_like(b)
    h[:, :, 0], decay[:, :, 0] = b[:, :, 0], a[:, :, 0]
    for i in range(1, width):
        torch.addcmul(b[:, :, i], a[:, :, i], h[:, :, i - 1], out=h[:, :, i])
        torch.mul(a[:, :, i], decay[:, :, i - 1], out=decay[:, :, i])
    for j in range(h.shape[1]):
        h[:, j].addcmul_(decay[:, j], state[:, None])
        state = h[:, j, -1]
    return h.flatten(1, 2)[:, :length]
