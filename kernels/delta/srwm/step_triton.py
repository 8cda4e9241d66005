"""The self-referential weight matrix in place on a pool of states, as a Triton kernel.

One program owns the whole matrix of one head, as four tiles: what it writes depends on a softmax over the
matrix's own product with the input. The learned weight is the same for all sequences, and is read again for
every token, from cache.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _softmax(x, mask):
    x = tl.where(mask, x, float("-inf"))
    x = tl.exp(x - tl.max(x, axis=0))
    return x / tl.sum(x, axis=0)


@triton.jit
def _updated(S, W, k, difference, beta, which: tl.constexpr):
    """S + k (sigmoid(beta[which]) W^T difference)^T: S, W [D, n], k, difference [D], beta [4]."""
    rate = tl.sigmoid(tl.sum(tl.where(tl.arange(0, 4) == which, beta, 0.0), axis=0))
    return S + k[:, None] * (rate * tl.sum(W * difference[:, None], axis=0))[None, :]


@triton.jit
def srwm_step_kernel(
    x_ptr,  # [T, H, D]
    weight_ptr,  # [H, D, R], float32, R = E + 2 D + 4
    pool_ptr,  # [slots, depths, H, D, R], float32
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    out_ptr,  # [T, H, E]
    slot_stride,
    depth_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, to the next power of two
    BLOCK_E: tl.constexpr,
):
    segment = tl.program_id(0) // H
    h = tl.program_id(0) % H
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)

    R: tl.constexpr = E + 2 * D + 4
    i = tl.arange(0, BLOCK_D)
    in_d = i < D
    e = tl.arange(0, BLOCK_E)
    # The columns of y, q, k and beta within a row of R.
    at_y = i[:, None] * R + e[None, :]
    at_q = i[:, None] * R + E + i[None, :]
    at_k = at_q + D
    at_b = i[:, None] * R + E + 2 * D + tl.arange(0, 4)[None, :]
    in_y = in_d[:, None] & (e < E)[None, :]
    in_q = in_d[:, None] & in_d[None, :]
    in_b = in_d[:, None] & (tl.arange(0, 4) < 4)[None, :]
    # slot * stride passes 2^31 at some ten thousand slots: the product is 64-bit.
    state_ptr = pool_ptr + slot * slot_stride + depth * depth_stride + h * D * R
    base_ptr = weight_ptr + h * D * R
    Sy = tl.load(state_ptr + at_y, mask=in_y, other=0.0)
    Sq = tl.load(state_ptr + at_q, mask=in_q, other=0.0)
    Sk = tl.load(state_ptr + at_k, mask=in_q, other=0.0)
    Sb = tl.load(state_ptr + at_b, mask=in_b, other=0.0)

    for t in range(first, last):
        x = tl.load(x_ptr + (t * H + h) * D + i, mask=in_d, other=0.0).to(tl.float32)[:, None]
        Wy = Sy + tl.load(base_ptr + at_y, mask=in_y, other=0.0)
        Wq = Sq + tl.load(base_ptr + at_q, mask=in_q, other=0.0)
        Wk = Sk + tl.load(base_ptr + at_k, mask=in_q, other=0.0)
        Wb = Sb + tl.load(base_ptr + at_b, mask=in_b, other=0.0)
        y = tl.sum(Wy * x, axis=0)
        tl.store(out_ptr + (t * H + h) * E + e, y.to(out_ptr.dtype.element_ty), mask=e < E)
        k = _softmax(tl.sum(Wk * x, axis=0), in_d)
        difference = _softmax(tl.sum(Wq * x, axis=0), in_d) - k
        beta = tl.sum(Wb * x, axis=0)
        Sy = _updated(Sy, Wy, k, difference, beta, 0)
        Sq = _updated(Sq, Wq, k, difference, beta, 1)
        Sk = _updated(Sk, Wk, k, difference, beta, 2)
        Sb = _updated(Sb, Wb, k, difference, beta, 3)

    tl.store(state_ptr + at_y, Sy, mask=in_y)
    tl.store(state_ptr + at_q, Sq, mask=in_q)
    tl.store(state_ptr + at_k, Sk, mask=in_q)
    tl.store(state_ptr + at_b, Sb, mask=in_b)
