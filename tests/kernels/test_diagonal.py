"""Diagonal states: naive = scan = numba steps = Triton steps, whatever the shapes and variants; and what
others compute."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.diagonal import linear, logsumexp, selective
from kernels.diagonal.linear import (
    gated,
    gated_naive,
    gated_scan,
    lru,
    lru_naive,
    lru_scan,
    s4d,
    s4d_naive,
    s4d_scan,
)
from kernels.diagonal.logsumexp import aaren, aaren_naive, aaren_scan, wkv, wkv_naive, wkv_scan
from kernels.diagonal.recurrence import recurrence
from kernels.diagonal.selective import selective_naive, selective_scan
from tests.kernels.compile_ahead import compile_ahead
from tests.kernels.pools import poisoned_pool, untouched

Result = tuple[Tensor, Tensor]


@dataclass
class Case:
    """One op on one set of inputs, in its four forms. All take and return states [S, *shape]."""

    states: Tensor
    inputs: list[Tensor]  # all that a gradient can be taken of
    naive: Callable[[slice, Tensor], Result]  # the tokens of one segment, its state
    scan: Callable[[Tensor, Tensor], Result]  # states, offsets
    steps: dict[str, Callable[..., Tensor]]  # implementation -> f(pool, slots, depths, offsets)
    public: Callable[..., Tensor]  # f(pool or None, slots, depths, offsets)


def case(kind: str, lengths: list[int], C: int, N: int) -> Case:
    torch.manual_seed(sum(lengths) + C)
    T, S = sum(lengths), len(lengths)
    x, z, k, u = torch.randn(T, C), torch.randn(T, C), 3 * torch.randn(T, C), torch.randn(C)
    D = torch.randn(C)

    def steps(module, *args: Tensor | None) -> dict[str, Callable[..., Tensor]]:  # type: ignore[no-untyped-def]
        return {
            "numba": lambda *at: module._on_cpu(*args, *at),
            "triton": lambda *at: module._on_gpu(*args, *at),
        }

    if kind.startswith("selective"):
        skip, gate = (D, z) if kind == "selective_fused" else (None, None)
        dt, A, B, R = torch.rand(T, C), -5 * torch.rand(N, C), torch.randn(T, N), torch.randn(T, N)
        return Case(
            torch.randn(S, N, C),
            [x, dt, A, B, R, D, z] if skip is not None else [x, dt, A, B, R],
            lambda s, h: selective_naive(
                x[s], dt[s], A, B[s], R[s], skip, None if gate is None else gate[s], h
            ),
            lambda h, offsets: selective_scan(x, dt, A, B, R, skip, gate, h, offsets),
            steps(selective, x, dt, A, B, R, skip, gate),
            lambda *at: selective.selective(x, dt, A, B, R, skip, gate, *at),
        )
    if kind == "gated":
        g = -3 * torch.rand(T, C)
        return Case(
            torch.randn(S, C),
            [g, x],
            lambda s, h: gated_naive(g[s], x[s], h),
            lambda h, offsets: gated_scan(g, x, h, offsets),
            steps(linear, x, g, None, None),
            lambda *at: gated(g, x, *at),
        )
    if kind == "lru":
        lam, b = polar(C), torch.randn(T, 2, C)
        return Case(
            torch.randn(S, 2, C),
            [b, lam],
            lambda s, h: lru_naive(b[s], lam, h),
            lambda h, offsets: lru_scan(b, lam, h, offsets),
            steps(linear, b, lam, None, None),
            lambda *at: lru(b, lam, *at),
        )
    if kind.startswith("s4d"):
        skip = D if kind == "s4d_skip" else None
        lam, c = polar(N, C), torch.randn(2, N, C)
        return Case(
            torch.randn(S, 2, N, C),
            [x, lam, c] if skip is None else [x, lam, c, D],
            lambda s, h: s4d_naive(x[s], lam, c, skip, h),
            lambda h, offsets: s4d_scan(x, lam, c, skip, h, offsets),
            steps(linear, x, lam, c, skip),
            lambda *at: s4d(x, lam, c, skip, *at),
        )
    if kind == "aaren":
        s, v = 3 * torch.randn(T, C), torch.randn(T, C, N)
        states = torch.randn(S, C * (N + 2))
        states[:, C * N : C * N + C] = 1 + torch.rand(S, C)
        return Case(
            states,
            [s, v],
            lambda at, h: aaren_naive(s[at], v[at], h),
            lambda h, offsets: aaren_scan(s, v, h, offsets),
            steps(logsumexp, s, v, None, None),
            lambda *at: aaren(s, v, *at),
        )
    w = -2 * torch.rand(C)
    states = torch.randn(S, 3, C)
    states[:, 1] = 1 + torch.rand(S, C)
    return Case(
        states,
        [k, x, w, u],
        lambda s, h: wkv_naive(k[s], x[s], w, u, h),
        lambda h, offsets: wkv_scan(k, x, w, u, h, offsets),
        steps(logsumexp, k, x, w, u),
        lambda *at: wkv(k, x, w, u, *at),
    )


def polar(*shape: int) -> Tensor:
    """Complex numbers in the unit disc, as two planes."""
    angle = 6.3 * torch.rand(shape)
    return torch.stack([angle.cos(), angle.sin()]) * torch.rand(shape)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def by_naive(c: Case, lengths: list[int], states: Tensor | None = None) -> Result:
    ends = bounds(lengths).tolist()
    states = c.states if states is None else states
    runs = [c.naive(slice(a, b), states[i]) for i, (a, b) in enumerate(pairwise(ends))]
    return torch.cat([o for o, _ in runs]), torch.stack([s for _, s in runs])


def close(got: Result, expected: Result, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


KINDS = ["selective", "selective_fused", "gated", "lru", "s4d", "s4d_skip", "aaren", "wkv"]
lengths = st.lists(st.integers(0, 25), min_size=1, max_size=3).filter(any)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@given(lengths, st.integers(1, 9), st.integers(1, 9))
def test_scan_equals_naive(kind: str, lengths: list[int], C: int, N: int) -> None:
    c = case(kind, lengths, C, N)
    close(c.scan(c.states, bounds(lengths)), by_naive(c, lengths), 1e-4)


@pytest.mark.parametrize("kind", ["selective", "s4d"])
def test_scan_carries_the_state_from_chunk_to_chunk(kind: str) -> None:
    c = case(kind, [300, 10, 129], 3, 2)
    close(c.scan(c.states, bounds([300, 10, 129])), by_naive(c, [300, 10, 129]), 1e-4)


@every_kind
@pytest.mark.parametrize("implementation", ["numba", "triton"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 0, 6]], ids=["decode", "mixed"])
def test_steps_equal_naive(kind: str, implementation: str, lengths: list[int]) -> None:
    c = case(kind, lengths, 37, 5)
    slots = torch.tensor([3, 5, 1, 8])[: len(lengths)]
    depths = torch.tensor([0, 2, 1, 2])[: len(lengths)]
    pool = poisoned_pool(c.states, slots, depths)
    out = c.steps[implementation](pool, slots, depths, bounds(lengths))
    close((out, pool[slots, depths]), by_naive(c, lengths), 1e-5)
    assert untouched(pool, slots, depths)


@every_kind
def test_steps_cut_wide_states_into_blocks(kind: str) -> None:
    c = case(kind, [2, 1], 700, 2)
    index = torch.tensor([1, 2]), torch.tensor([0, 0])
    pool = poisoned_pool(c.states, *index)
    out = c.steps["numba"](pool, *index, bounds([2, 1]))
    close((out, pool[index]), by_naive(c, [2, 1]), 1e-5)


@every_kind
@given(st.integers(0, 12), st.integers(0, 12))
def test_two_chunks_equal_one(kind: str, first: int, second: int) -> None:
    c = case(kind, [first + second], 5, 3)
    at = torch.tensor([1]), torch.tensor([0])
    whole, halves = (
        c.states.new_zeros(2, 1, *c.states.shape[1:]),
        c.states.new_zeros(2, 1, *c.states.shape[1:]),
    )
    whole[at], halves[at] = c.states, c.states
    together = c.public(whole, *at, bounds([first + second]))
    # The two halves as segments of the same slot, one call after the other: the other half is a zero-length
    # segment.
    parts = [c.public(halves, *at, torch.tensor(ends)) for ends in ([0, first], [first, first + second])]
    got = torch.cat([parts[0][:first], parts[1][first:]])
    torch.testing.assert_close(got, together, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(halves, whole, rtol=1e-6, atol=1e-6)


@every_kind
def test_no_pool_is_a_fresh_state(kind: str) -> None:
    c = case(kind, [4, 0, 3], 5, 3)
    fresh = torch.zeros_like(c.states)
    at = torch.arange(3), torch.zeros(3, dtype=torch.long), bounds([4, 0, 3])
    expected = by_naive(c, [4, 0, 3], fresh)[0]
    torch.testing.assert_close(c.public(None, *at), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(c.public(fresh.unsqueeze(1).clone(), *at), expected, rtol=1e-5, atol=1e-5)


@every_kind
def test_gradient_of_the_scan_equals_that_of_the_loop(kind: str) -> None:
    lengths = [9, 1, 0, 17]
    c = case(kind, lengths, 4, 3)
    leaves = [x.requires_grad_() for x in (*c.inputs, c.states)]
    expected, got = by_naive(c, lengths), c.scan(c.states, bounds(lengths))
    # The last two may scale numerator and denominator differently: only their output is defined.
    by_state = 0.0 if kind in ("aaren", "wkv") else 1.0
    weight = torch.randn_like(expected[0])
    losses = [(o * weight).sum() + by_state * s.square().sum() for o, s in (expected, got)]
    by_loop, by_scan = (torch.autograd.grad(loss, leaves) for loss in losses)
    torch.testing.assert_close(by_scan, by_loop, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["selective", "selective_fused"])
def test_training_gradient_equals_autograd_through_the_scan(kind: str) -> None:
    c = case(kind, [30, 1, 0, 40], 70, 5)
    leaves = [x.requires_grad_() for x in c.inputs]
    offsets = bounds([30, 1, 0, 40])
    by_scan = c.scan(torch.zeros_like(c.states), offsets)[0]
    trained = c.public(None, offsets[:-1], offsets[:-1], offsets)  # without a pool: the kernel for training
    weight = torch.randn_like(by_scan)
    torch.testing.assert_close(trained, by_scan, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad((by_scan * weight).sum(), leaves)
    got = torch.autograd.grad((trained * weight).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@given(st.integers(1, 70), st.booleans())
def test_recurrence_passes_gradcheck(length: int, is_complex: bool) -> None:
    dtype = torch.complex128 if is_complex else torch.float64
    a, b = (0.5 * torch.randn(2, length, 2, dtype=dtype, requires_grad=True) for _ in range(2))
    state = torch.randn(2, 2, dtype=dtype, requires_grad=True)
    if length <= 5:
        assert torch.autograd.gradcheck(recurrence, (a, b, state))
    h = recurrence(a, b, state)
    before = torch.cat([state[:, None], h[:, :-1]], 1)
    torch.testing.assert_close(h, a * before + b)


@every_kind
@pytest.mark.parametrize("implementation", ["numba", "triton"])
def test_padded_rows_leave_live_slots_alone(kind: str, implementation: str) -> None:
    c = case(kind, [1, 1, 1], 5, 3)
    expected, ends = by_naive(c, [1, 1, 1])
    pool = torch.zeros(4, 1, *c.states.shape[1:])
    pool[2, 0] = c.states[0]
    got = c.steps[implementation](pool, torch.tensor([2, 0, 0]), torch.tensor([0, 0, 0]), bounds([1, 1, 1]))
    close((got[0], pool[2, 0]), (expected[0], ends[0]), 1e-5)
    assert not pool[1].any() and not pool[3].any()


@pytest.mark.parametrize("kind", ["selective", "gated", "s4d", "aaren"])
@pytest.mark.parametrize("implementation", ["numba", "triton"])
def test_slot_index_arithmetic_is_64_bit(kind: str, implementation: str) -> None:
    """A slot whose offset passes 2^31 elements. The pool is virtual memory; only one slot of it is ever
    touched."""
    c = case(kind, [1], 64, 16)
    slot = 2**31 // c.states[0].numel() + 1
    pool = torch.empty(slot + 1, 1, *c.states.shape[1:])
    pool[slot] = c.states
    got = c.steps[implementation](pool, torch.tensor([slot]), torch.tensor([0]), bounds([1]))
    close((got, pool[slot]), by_naive(c, [1]), 1e-5)


def test_operators_keep_their_schema() -> None:
    """That they change the pool and nothing else, and return the shape that torch.compile is told."""
    T, C, N = 3, 5, 2
    x, index = torch.randn(T, C), (torch.tensor([1, 2]), torch.tensor([0, 0]), bounds([2, 1]))
    pools = {shape: torch.zeros(3, 1, *shape) for shape in ((C,), (2, N, C), (N, C), (C * (N + 2),))}
    A, B, lam = -torch.rand(N, C), torch.randn(T, N), polar(N, C)
    operators = torch.ops.fathom
    for operator, *args in (
        (operators.selective_step, x, x.abs(), A, B, B, None, None, pools[N, C]),
        (operators.linear_step, x, -x.abs(), None, None, pools[C,]),
        (operators.linear_step, x, lam, lam, x[0], pools[2, N, C]),
        (operators.logsumexp_step, x, torch.randn(T, C, N), None, None, pools[C * (N + 2),]),
    ):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator.default, (*args, *index), test_utils=tests)


# What others compute


def test_selective_equals_transformers_mamba() -> None:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan, mamba_selective_state_update

    T, C, N = 11, 6, 4
    x, z, raw = torch.randn(T, C), torch.randn(T, C), torch.randn(T, C)
    A, B, R, D, bias = -torch.rand(C, N), torch.randn(T, N), torch.randn(T, N), torch.randn(C), torch.randn(C)
    dt = F.softplus(raw + bias)
    pool, at = torch.zeros(2, 1, N, C), (torch.tensor([1]), torch.tensor([0]))
    got = selective.selective(x, dt, A.t(), B, R, D, z, pool, *at, bounds([T]))
    theirs = (i.t()[None] for i in (x, raw))
    scan, update = (inspect.unwrap(f) for f in (mamba_selective_scan, mamba_selective_state_update))
    y, state = scan(
        *theirs, A, B.t()[None], R.t()[None], D, z.t()[None], bias, True, return_last_state=True
    )  # fmt: skip
    close((got, pool[1, 0]), (y[0].t(), state[0].t()), 1e-5)
    # One token more, from their state.
    one = [i[:1] for i in (x, raw, B, R, z)]
    y = update(state, one[0], one[1], A, one[2], one[3], D, bias, True, one[4])
    got = selective.selective(one[0], dt[:1], A.t(), one[2], one[3], D, one[4], pool, *at, bounds([1]))
    close((got, pool[1, 0]), (y, state[0].t()), 1e-5)


def test_gated_equals_flash_linear_attentions_hgrn() -> None:
    from fla.ops.hgrn.naive import naive_recurrent_hgrn

    x, g, state = torch.randn(1, 9, 5), -torch.rand(1, 9, 5), torch.randn(1, 5)
    expected = naive_recurrent_hgrn(x, g, state, output_final_state=True)
    pool = state[:, None].clone()
    got = gated(g[0], x[0], pool, torch.tensor([0]), torch.tensor([0]), bounds([9]))
    close((got, pool[0]), (expected[0][0], expected[1]), 1e-5)


def test_gated_equals_transformers_recurrent_gemma() -> None:
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    layer = RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=8, lru_width=8, num_attention_heads=2))
    decay, inputs = torch.rand(1, 7, 8), torch.randn(1, 7, 8)
    first = torch.arange(7)[None, :, None] == 0
    expected, state = layer._rnn_scan(inputs, decay, first, None)
    got = gated(decay[0].log(), inputs[0], None, torch.tensor([0]), torch.tensor([0]), bounds([7]))
    close((got, got[-1]), (expected[0], state[0]), 1e-5)


def test_s4d_equals_a_convolution_with_its_impulse_response() -> None:
    T, N, C = 30, 4, 3
    u, dt, A = torch.randn(T, C), 0.1, -0.5 + 1j * np.pi * np.arange(N)  # S4D-Lin
    B, R = np.ones(N), np.random.default_rng(0).normal(size=(N, C, 2)) @ [1, 1j]
    lam, c = np.exp(dt * A), R * (B * (np.exp(dt * A) - 1) / A)[:, None]
    response = 2 * np.real(np.einsum("ln,nc->lc", lam ** np.arange(T)[:, None], c))
    expected = np.stack([np.convolve(u[:, i], response[:, i])[:T] for i in range(C)], 1)

    def planes(x: np.ndarray) -> Tensor:
        return torch.tensor(np.stack([x.real, x.imag]), dtype=torch.float32)

    pool = torch.zeros(1, 1, 2, N, C)
    lam_planes = planes(lam)[..., None].expand(2, N, C).contiguous()
    got = s4d(u, lam_planes, planes(c), None, pool, torch.tensor([0]), torch.tensor([0]), bounds([T]))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_lru_equals_complex_arithmetic() -> None:
    T, C = 20, 4
    nu, theta = np.random.default_rng(0).normal(size=C), np.linspace(0, 3, C)
    lam = np.exp(-np.exp(nu) + 1j * np.exp(theta))
    b = np.random.default_rng(1).normal(size=(T, C, 2)) @ [1, 1j]
    x, expected = np.zeros(C, complex), []
    for t in range(T):
        x = lam * x + b[t]
        expected.append(x)
    planes = torch.tensor(np.stack([b.real, b.imag], 1), dtype=torch.float32)
    lam_planes = torch.tensor(np.stack([lam.real, lam.imag]), dtype=torch.float32)
    got = lru(planes, lam_planes, torch.zeros(1, 1, 2, C), torch.tensor([0]), torch.tensor([0]), bounds([T]))
    np.testing.assert_allclose(torch.complex(got[:, 0], got[:, 1]), np.stack(expected), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 20), st.sampled_from([1.0, 100.0, 1e4]), st.sampled_from([0.0, -1e3, 1e3]))
def test_aaren_equals_softmax_attention_at_any_scale(length: int, spread: float, shift: float) -> None:
    torch.manual_seed(length)
    s, v = spread * torch.randn(length, 2) + shift, torch.randn(length, 2, 3)
    expected = torch.stack(
        [torch.einsum("th,thv->hv", s[: t + 1].softmax(0), v[: t + 1]) for t in range(length)]
    )
    at = torch.tensor([0]), torch.tensor([0]), bounds([length])
    for pool in (torch.zeros(1, 1, 10), None):
        torch.testing.assert_close(aaren(s, v, pool, *at), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, -500.0, 500.0])
def test_wkv_equals_transformers_rwkv(shift: float) -> None:
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    T, C = 12, 6
    k, v, decay, first = torch.randn(T, C) + shift, torch.randn(T, C), torch.randn(C), torch.randn(C)
    expected, state = rwkv_linear_attention_cpu(decay, first, k[None], v[None], return_state=True)
    pool = torch.zeros(1, 1, 3, C)
    got = wkv(k, v, -decay.exp(), first, pool, torch.tensor([0]), torch.tensor([0]), bounds([T]))
    close((got, pool[0, 0]), (expected[0], torch.stack([x[0] for x in state])), 1e-5)


# Ahead of time for sm_90

INDICES = dict.fromkeys(("slots_ptr", "depths_ptr", "offsets_ptr"), "*i64")
STRIDES = dict.fromkeys(("slot_stride", "depth_stride"), "i64")


@pytest.mark.parametrize(("N", "block_c", "warps"), [(16, 32, 1), (16, 128, 4), (64, 32, 4), (64, 64, 4)])
def test_selective_compiles_ahead_for_sm_90_without_spills(N: int, block_c: int, warps: int) -> None:
    tokens = dict.fromkeys(("x_ptr", "dt_ptr", "B_ptr", "C_ptr", "z_ptr", "out_ptr"), "*bf16")
    floats = dict.fromkeys(("A_ptr", "D_ptr", "pool_ptr"), "*fp32")
    constexprs = {"C": 1536, "N": N, "BLOCK_C": block_c, "BLOCK_N": N, "SKIP": True, "GATE": True}
    options = {
        "signature": {**tokens, **floats, **INDICES, **STRIDES},
        "constexprs": constexprs,
        "warps": warps,
    }
    cost = compile_ahead("kernels.diagonal.selective.step_triton", "selective_step_kernel", options)
    print(f"N={N} block={block_c}: {cost['registers']} registers, {cost['spills']} bytes spilled")
    assert cost["spills"] == 0


@pytest.mark.parametrize(
    ("N", "block_c", "warps", "is_complex", "read"),
    [(1, 128, 1, False, False), (1, 128, 1, True, False), (16, 64, 4, True, True), (64, 16, 4, True, True)],
    ids=["gated", "lru", "s4d_16", "s4d_64"],
)
def test_linear_compiles_ahead_for_sm_90_without_spills(  # type: ignore[no-untyped-def]
    N, block_c, warps, is_complex, read
) -> None:
    tokens = dict.fromkeys(("u_ptr", "out_ptr"), "*bf16")
    floats = dict.fromkeys(("decay_ptr", "read_ptr", "skip_ptr", "pool_ptr"), "*fp32")
    constexprs = {
        "C": 1536, "N": N, "BLOCK_C": block_c, "BLOCK_N": N,
        "COMPLEX": is_complex, "READ": read, "SKIP": read,
    }  # fmt: skip
    options = {
        "signature": {**tokens, **floats, **INDICES, **STRIDES},
        "constexprs": constexprs,
        "warps": warps,
    }
    cost = compile_ahead("kernels.diagonal.linear.step_triton", "linear_step_kernel", options)
    assert cost["spills"] == 0


@pytest.mark.parametrize(("H", "V", "block_h", "warps"), [(1024, 1, 128, 1), (12, 64, 16, 1), (8, 256, 8, 4)])
def test_logsumexp_compiles_ahead_for_sm_90_without_spills(H: int, V: int, block_h: int, warps: int) -> None:
    tokens = dict.fromkeys(("s_ptr", "v_ptr", "out_ptr"), "*bf16")
    floats = dict.fromkeys(("w_ptr", "u_ptr", "pool_ptr"), "*fp32")
    constexprs = {"H": H, "V": V, "BLOCK_H": block_h, "BLOCK_V": V, "BONUS": V == 1}
    options = {
        "signature": {**tokens, **floats, **INDICES, **STRIDES},
        "constexprs": constexprs,
        "warps": warps,
    }
    cost = compile_ahead("kernels.diagonal.logsumexp.step_triton", "logsumexp_step_kernel", options)
    assert cost["spills"] == 0
