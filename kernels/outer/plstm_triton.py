"""pLSTM's recurrence in place on a pool of states, as a Triton kernel: a program owns some columns of all J
copies."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def plstm_step_kernel(
    p_ptr,  # [T, H, Y, J, K]
    k_ptr,  # [T, H, M, K]
    w_ptr,  # [T, H, J, M, V]
    transition_ptr,  # [T, H, J, J]
    pool_ptr,  # [slots, depths, H, J, K, V], float32
    slots_ptr,  # [N] int64
    depths_ptr,  # [N] int64
    offsets_ptr,  # [N + 1] int64
    out_ptr,  # [T, H, Y, V], float32
    slot_stride,
    depth_stride,
    H: tl.constexpr,
    Y: tl.constexpr,  # outputs of a head
    J: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    state = tl.program_id(0) // blocks  # not an axis of its own: those end at 65,535
    segment = state // H
    h = state % H
    slot = tl.load(slots_ptr + segment).to(tl.int64)
    depth = tl.load(depths_ptr + segment).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)

    j, i = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_K)
    x = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    in_j, in_k, in_v = j < J, i < K, x < V
    in_jk = in_j[:, None] & in_k[None, :]
    inside = in_jk[:, :, None] & in_v[None, None, :]
    at = pool_ptr + slot * slot_stride + depth * depth_stride + h * J * K * V
    tile_ptr = at + (j[:, None] * K + i[None, :])[:, :, None] * V + x[None, None, :]
    C = tl.load(tile_ptr, mask=inside, other=0.0)  # [BLOCK_J, BLOCK_K, BLOCK_V]

    for t in range(first, last):
        th = t * H + h
        for o in tl.static_range(Y):
            p_at = p_ptr + ((th * Y + o) * J + j[:, None]) * K + i[None, :]
            p = tl.load(p_at, mask=in_jk, other=0.0).to(tl.float32)
            y = tl.sum(tl.sum(p[:, :, None] * C, axis=0), axis=0)
            tl.store(out_ptr + (th * Y + o) * V + x, y, mask=in_v)
        new = tl.zeros([BLOCK_J, BLOCK_K, BLOCK_V], tl.float32)
        for m in tl.static_range(M):
            k = tl.load(k_ptr + (th * M + m) * K + i, mask=in_k, other=0.0).to(tl.float32)
            w_at = w_ptr + ((th * J + j[:, None]) * M + m) * V + x[None, :]
            w = tl.load(w_at, mask=in_j[:, None] & in_v[None, :], other=0.0).to(tl.float32)
            new += k[None, :, None] * w[:, None, :]
        for b in tl.static_range(J):
            one = tl.sum(tl.where((j == b)[:, None, None], C, 0.0), axis=0)  # copy b of the state
            a = tl.load(transition_ptr + (th * J + j) * J + b, mask=in_j, other=0.0).to(tl.float32)
            new += a[:, None, None] * one[None, :, :]
        C = new

    tl.store(tile_ptr, C, mask=inside)
