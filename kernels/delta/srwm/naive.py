"""The self-referential weight matrix, one token at a time (arXiv 2202.05780, eq. 5-8).

    [y, q, k, beta] = W_{t-1} x_t;  q, k = softmax(q), softmax(k) W_t = W_{t-1} + sigmoid(beta) (W_{t-1} q -
    W_{t-1} k) k^T, with one of the four betas for each block of rows

W is kept transposed, as the other matrix states are: [D, R], the R = E + 2 D + 4 columns being those of y
[E], q [D], k [D] and beta [4]. It is learned weight plus state, so that a state of zeros is a fresh sequence.
"""

import torch
from torch import Tensor


def srwm_naive(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence, one head at a time: x [T, H, D], weight [H, D, R], state [H, D, R] -> y [T, H, E], the
    final state. The papers' models take a softmax of x first; that is the caller's."""
    D = x.shape[2]
    sizes = [weight.shape[2] - 2 * D - 4, D, D, 4]
    out = x.new_empty(*x.shape[:2], sizes[0])
    state = state.clone()
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            W = (weight[h] + state[h]).T  # [R, D]
            y, q, k, beta = (W @ x[t, h]).split(sizes)
            q, k = q.softmax(0), k.softmax(0)
            rate = torch.cat([b.sigmoid().expand(n) for b, n in zip(beta, sizes, strict=True)])
            state[h] = state[h] + torch.outer(rate * (W @ q - W @ k), k).T
            out[t, h] = y
    return out, state
