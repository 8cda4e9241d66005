"""Linear recurrences whose decay is given, one token at a time.

    gated: h_t = exp(g_t) h_{t-1} + b_t   h: [C] real       (RG-LRU: arXiv 2402.19427 eq. 4; HGRN 2311.04823)
    lru:   x_t = lambda x_{t-1} + b_t     x: [C] complex    (LRU: arXiv 2303.06349)
    s4d:   x_t = lambda x_{t-1} + u_t,    x: [N, C] complex (S4D: arXiv 2206.11893, B folded into c)
           y_t = 2 Re(sum_n c_n x_{t,n}) + D u_t

Complex numbers are two planes, real then imaginary, in the dimension before the channels (before [N, C]).
"""

import torch
from torch import Tensor


def gated_naive(g: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: log decay g and input b [T, C], state [C] -> h [T, C], the final state."""
    out = torch.empty_like(b)
    for t in range(b.shape[0]):
        state = g[t].exp() * state + b[t]
        out[t] = state
    return out, state


def lru_naive(b: Tensor, lam: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: b [T, 2, C], lambda [2, C], state [2, C] -> x [T, 2, C], the final state."""
    out = torch.empty_like(b)
    for t in range(b.shape[0]):
        state = _times(lam, state) + b[t]
        out[t] = state
    return out, state


def s4d_naive(u: Tensor, lam: Tensor, c: Tensor, D: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: u [T, C], lambda, c [2, N, C], D [C], state [2, N, C] -> y [T, C], the final state."""
    out = torch.empty_like(u)
    for t in range(u.shape[0]):
        state = _times(lam, state)
        state[0] += u[t]
        y = 2 * _times(c, state)[0].sum(0)
        out[t] = y if D is None else y + D * u[t]
    return out, state


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]])
