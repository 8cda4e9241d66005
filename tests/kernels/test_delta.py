"""Delta-rule kernels: naive = scan = numba steps = Triton steps, whatever the shapes and variants; and what
others compute."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import delta as delta_op
from kernels.delta import delta, delta_naive, delta_scan, dplr, dplr_naive, dplr_scan
from kernels.delta import srwm as srwm_op
from kernels.delta.srwm import srwm, srwm_naive, srwm_scan
from kernels.tiles import tile
from tests.kernels.compile_ahead import compile_ahead
from tests.kernels.pools import poisoned_pool, untouched

Result = tuple[Tensor, Tensor]
SCALE = 0.3


@dataclass
class Case:
    """One op on one set of inputs, in its four forms. All take and return states [N, *shape]."""

    states: Tensor
    inputs: list[Tensor]  # all that a gradient can be taken of
    naive: Callable[[slice, Tensor], Result]  # the tokens of one segment, its state
    scan: Callable[[Tensor, Tensor], Result]  # states, offsets
    steps: dict[str, Callable[..., Tensor]]  # implementation -> f(pool, slots, depths, offsets)
    public: Callable[..., Tensor]  # f(pool or None, slots, depths, offsets)


def case(
    kind: str, lengths: list[int], heads: tuple[int, int], K: int, V: int, strength: float = 1.0
) -> Case:
    """`heads`: of q and k, and of v. `strength` multiplies the log decay."""
    torch.manual_seed(sum(lengths) + K)
    T, N, (few, H) = sum(lengths), len(lengths), heads
    q, k = torch.randn(T, few, K), F.normalize(torch.randn(T, few, K), dim=-1)
    v, states = torch.randn(T, H, V), torch.randn(N, H, K, V)
    if kind == "srwm":
        x, weight = torch.randn(T, H, K).softmax(-1), torch.randn(H, K, V + 2 * K + 4)
        return Case(
            torch.randn(N, *weight.shape),
            [x, weight],
            lambda s, S: srwm_naive(x[s], weight, S),
            lambda S, offsets: srwm_scan(x, weight, S, offsets),
            steps(srwm_op, x, weight),
            lambda *at: srwm(x, weight, *at),
        )
    if kind == "rwkv7":
        q, k = torch.randn(T, H, K), torch.randn(T, H, K)
        kappa, w = F.normalize(torch.randn(T, H, K), dim=-1), -0.6065 * strength * torch.rand(T, H, K)
        a, b = -kappa, kappa * torch.rand(T, H, K)
        return Case(
            states,
            [q, w, k, v, a, b],
            lambda s, S: dplr_naive(q[s], w[s], k[s], v[s], a[s], b[s], S, SCALE),
            lambda S, offsets: dplr_scan(q, w, k, v, a, b, S, offsets, SCALE),
            steps(delta_op, q, k, v, None, w, a, b, scale=SCALE),
            lambda *at: dplr(q, w, k, v, a, b, *at, scale=SCALE),
        )
    beta = (2 if kind == "delta_net" else 1) * torch.rand(T, H)  # up to 2: negative eigenvalues
    shape = {"delta_net": None, "gated_delta_net": (T, H), "kda": (T, few, K)}[kind]
    g = None if shape is None else -2 * strength * torch.rand(shape)
    return Case(
        states,
        [q, k, v, beta] if g is None else [q, k, v, beta, g],
        lambda s, S: delta_naive(q[s], k[s], v[s], beta[s], None if g is None else g[s], S, SCALE),
        lambda S, offsets: delta_scan(q, k, v, beta, g, S, offsets, SCALE),
        steps(delta_op, q, k, v, beta, g, None, None, scale=SCALE),
        lambda *at: delta(q, k, v, beta, g, *at, scale=SCALE),
    )


def steps(module, *args: Tensor | None, **scale: float) -> dict[str, Callable[..., Tensor]]:  # type: ignore[no-untyped-def]
    return {
        "numba": lambda *at: module._on_cpu(*args, *at, **scale),
        "triton": lambda *at: module._on_gpu(*args, *at, **scale),
    }


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def by_naive(c: Case, lengths: list[int], states: Tensor | None = None) -> Result:
    states = c.states if states is None else states
    runs = [c.naive(slice(a, b), states[i]) for i, (a, b) in enumerate(pairwise(bounds(lengths).tolist()))]
    return torch.cat([o for o, _ in runs]), torch.stack([s for _, s in runs])


def close(got: Result, expected: Result, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


KINDS = ["delta_net", "gated_delta_net", "kda", "rwkv7", "srwm"]
lengths = st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any)
head_counts = st.sampled_from([(1, 1), (3, 3), (2, 4), (1, 3)])
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@given(lengths, head_counts, st.integers(1, 9), st.integers(1, 9))
def test_scan_equals_naive(kind: str, lengths: list[int], heads: tuple[int, int], K: int, V: int) -> None:
    c = case(kind, lengths, heads, K, V)
    close(c.scan(c.states, bounds(lengths)), by_naive(c, lengths), 1e-4)


@every_kind
def test_scan_carries_the_state_from_chunk_to_chunk(kind: str) -> None:
    c = case(kind, [150, 10, 64], (1, 2), 5, 3)
    close(c.scan(c.states, bounds([150, 10, 64])), by_naive(c, [150, 10, 64]), 1e-4)


@pytest.mark.parametrize("kind", ["gated_delta_net", "kda", "rwkv7"])
@given(lengths, st.integers(1, 9), st.integers(1, 9))
def test_strong_decay_neither_overflows_nor_loses_precision(
    kind: str, lengths: list[int], K: int, V: int
) -> None:
    c = case(
        kind, lengths, (2, 2), K, V, strength=100.0
    )  # e^-60 to e^-200 a token: beyond float32, both ways
    close(c.scan(c.states, bounds(lengths)), by_naive(c, lengths), 1e-3)


def test_scan_stays_accurate_when_keys_repeat() -> None:
    """The same key for a whole chunk with beta 2: the triangular system is as badly conditioned as it
    gets."""
    q, k = torch.randn(64, 1, 4), F.normalize(torch.ones(64, 1, 4), dim=-1)
    v, beta, states = torch.randn(64, 1, 3), torch.full((64, 1), 2.0), torch.randn(1, 1, 4, 3)
    expected, end = delta_naive(q, k, v, beta, None, states[0], 1.0)
    got = delta_scan(q, k, v, beta, None, states, bounds([64]), 1.0)
    close(got, (expected, end[None]), 1e-3)


@every_kind
@pytest.mark.parametrize("implementation", ["numba", "triton"])
@pytest.mark.parametrize("heads", [(3, 3), (2, 4)], ids=["equal", "grouped"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 0, 6]], ids=["decode", "mixed"])
def test_steps_equal_naive(
    kind: str, implementation: str, heads: tuple[int, int], lengths: list[int]
) -> None:
    c = case(kind, lengths, heads, 7, 5)
    slots = torch.tensor([3, 5, 1, 8])[: len(lengths)]
    depths = torch.tensor([0, 2, 1, 2])[: len(lengths)]
    pool = poisoned_pool(c.states, slots, depths)
    out = c.steps[implementation](pool, slots, depths, bounds(lengths))
    close((out, pool[slots, depths]), by_naive(c, lengths), 1e-5)
    assert untouched(pool, slots, depths)


@every_kind
@given(lengths, head_counts, st.integers(1, 20), st.integers(1, 20))
def test_numba_steps_equal_scan(
    kind: str, lengths: list[int], heads: tuple[int, int], K: int, V: int
) -> None:
    c = case(kind, lengths, heads, K, V)
    pool, slots = c.states[:, None].clone(), torch.arange(len(lengths))
    out = c.steps["numba"](pool, slots, torch.zeros_like(slots), bounds(lengths))
    close((out, pool[:, 0]), c.scan(c.states, bounds(lengths)), 1e-4)


@every_kind
@given(st.integers(0, 12), st.integers(0, 12))
def test_two_chunks_equal_one(kind: str, first: int, second: int) -> None:
    c = case(kind, [first + second], (2, 2), 5, 3)
    at = torch.tensor([1]), torch.tensor([0])
    whole, halves = (
        c.states.new_zeros(2, 1, *c.states.shape[1:]),
        c.states.new_zeros(2, 1, *c.states.shape[1:]),
    )
    whole[at], halves[at] = c.states, c.states
    together = c.public(whole, *at, bounds([first + second]))
    parts = [c.public(halves, *at, torch.tensor(ends)) for ends in ([0, first], [first, first + second])]
    got = torch.cat([parts[0][:first], parts[1][first:]])
    torch.testing.assert_close(got, together, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(halves, whole, rtol=1e-6, atol=1e-6)


@every_kind
def test_no_pool_is_a_fresh_state(kind: str) -> None:
    c = case(kind, [4, 0, 3], (1, 2), 5, 3)
    fresh = torch.zeros_like(c.states)
    at = torch.arange(3), torch.zeros(3, dtype=torch.long), bounds([4, 0, 3])
    expected = by_naive(c, [4, 0, 3], fresh)[0]
    torch.testing.assert_close(c.public(None, *at), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(c.public(fresh.unsqueeze(1).clone(), *at), expected, rtol=1e-5, atol=1e-5)


@every_kind
def test_gradient_of_the_scan_equals_that_of_the_loop(kind: str) -> None:
    lengths = [9, 1, 0, 17]
    c = case(kind, lengths, (1, 2), 4, 3)
    leaves = [x.requires_grad_() for x in (*c.inputs, c.states)]
    expected, got = by_naive(c, lengths), c.scan(c.states, bounds(lengths))
    weight = torch.randn_like(expected[0])
    losses = [(o * weight).sum() + s.square().sum() for o, s in (expected, got)]
    by_loop, by_scan = (torch.autograd.grad(loss, leaves) for loss in losses)
    torch.testing.assert_close(by_scan, by_loop, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["kda", "rwkv7"])
@pytest.mark.parametrize("heads", [(3, 3), (2, 4)], ids=["equal", "grouped"])
def test_training_gradient_equals_autograd_through_the_scan(kind: str, heads: tuple[int, int]) -> None:
    c = case(kind, [30, 1, 0, 70], heads, 7, 5)
    leaves = [x.requires_grad_() for x in c.inputs]
    offsets = bounds([30, 1, 0, 70])
    by_scan = c.scan(torch.zeros_like(c.states), offsets)[0]
    trained = c.public(None, offsets[:-1], offsets[:-1], offsets)  # without a pool: the kernel for training
    weight = torch.randn_like(by_scan)
    torch.testing.assert_close(trained, by_scan, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad((by_scan * weight).sum(), leaves)
    got = torch.autograd.grad((trained * weight).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@every_kind
@pytest.mark.parametrize("implementation", ["numba", "triton"])
def test_padded_rows_leave_live_slots_alone(kind: str, implementation: str) -> None:
    c = case(kind, [1, 1, 1], (2, 2), 4, 4)
    expected, ends = by_naive(c, [1, 1, 1])
    pool = torch.zeros(4, 1, *c.states.shape[1:])
    pool[2, 0] = c.states[0]
    got = c.steps[implementation](pool, torch.tensor([2, 0, 0]), torch.tensor([0, 0, 0]), bounds([1, 1, 1]))
    close((got[0], pool[2, 0]), (expected[0], ends[0]), 1e-5)
    assert not pool[1].any() and not pool[3].any()


@pytest.mark.parametrize("kind", ["kda", "srwm"])
@pytest.mark.parametrize("implementation", ["numba", "triton"])
def test_slot_index_arithmetic_is_64_bit(kind: str, implementation: str) -> None:
    """A slot whose offset passes 2^31 elements. Only one slot of the virtual memory is ever touched."""
    c = case(kind, [1], (2, 2), 32, 32)
    slot = 2**31 // c.states[0].numel() + 1
    pool = torch.empty(slot + 1, 1, *c.states.shape[1:])
    pool[slot] = c.states
    got = c.steps[implementation](pool, torch.tensor([slot]), torch.tensor([0]), bounds([1]))
    close((got, pool[slot]), by_naive(c, [1]), 1e-4)


def test_operators_keep_their_schema() -> None:
    """That they change the pool and nothing else, and return the shape that torch.compile is told."""
    c, s = case("gated_delta_net", [2, 1], (1, 2), 4, 3), case("srwm", [2, 1], (2, 2), 4, 3)
    index = torch.tensor([1, 2]), torch.tensor([0, 0]), bounds([2, 1])
    pools = [torch.zeros(3, 1, *states.shape[1:]) for states in (c.states, s.states)]
    tests = ("test_schema", "test_faketensor")
    args = (*c.inputs, None, None, pools[0], *index, SCALE)
    torch.library.opcheck(torch.ops.fathom.delta_step.default, args, test_utils=tests)
    torch.library.opcheck(torch.ops.fathom.srwm_step.default, (*s.inputs, pools[1], *index), test_utils=tests)


# What others compute. Theirs: [1, T, H, d], or [1, H, T, d] where marked.


def run(c: Case, length: int) -> Result:
    pool = c.states[:, None].clone()
    out = c.public(pool, torch.tensor([0]), torch.tensor([0]), bounds([length]))
    return out, pool[:, 0]


def test_delta_net_equals_flash_linear_attention() -> None:
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    c = case("delta_net", [12], (3, 3), 6, 5)
    q, k, v, beta = (x.transpose(0, 1)[None] for x in c.inputs)  # [1, H, T, ..]
    expected, state = delta_rule_recurrence(q * SCALE * 6**0.5, k, v, beta, c.states)
    close(run(c, 12), (expected[0].transpose(0, 1), state), 1e-5)


def test_gated_delta_net_equals_flash_linear_attention() -> None:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    c = case("gated_delta_net", [12], (3, 3), 6, 5)
    expected, state = naive_recurrent_gated_delta_rule(*(x[None] for x in c.inputs), SCALE, c.states, True)
    close(run(c, 12), (expected[0], state), 1e-5)


def test_gated_delta_net_equals_transformers_qwen3_next() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    c = case("gated_delta_net", [70], (2, 4), 8, 8)
    q, k, v, beta, g = (x[None] for x in c.inputs)
    q, k = (x.repeat_interleave(2, 2) for x in (q, k))
    in_torch = inspect.unwrap(torch_chunk_gated_delta_rule)  # not FLA's kernel, where that is installed
    expected, state = in_torch(
        q * SCALE * 8**0.5, k, v, g, beta, initial_state=c.states, output_final_state=True
    )
    close(run(c, 70), (expected[0], state), 1e-4)


def test_kda_equals_flash_linear_attention() -> None:
    from fla.ops.kda.naive import naive_recurrent_kda

    c = case("kda", [12], (2, 2), 6, 5)
    q, k, v, beta, g = (x[None] for x in c.inputs)
    expected, state = naive_recurrent_kda(q, k, v, g, beta, SCALE, c.states, True)
    close(run(c, 12), (expected[0], state), 1e-5)


def test_rwkv7_equals_flash_linear_attentions_general_form() -> None:
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    c = case("rwkv7", [12], (3, 3), 6, 5)
    q, w, k, v, a, b = (x.transpose(0, 1)[None] for x in c.inputs)  # [1, H, T, ..]
    expected, state = dplr_recurrence(q * SCALE * 6**0.5, k, v, a, b, w, c.states)
    close(run(c, 12), (expected[0].transpose(0, 1), state), 1e-5)


def test_srwm_writes_with_one_rate_for_each_block_of_rows() -> None:
    """The paper's equations with W as it stands there, [R, D], written out for one head and one token."""
    c = case("srwm", [1], (1, 1), 3, 2)
    x, W = c.inputs[0][0, 0], (c.inputs[1] + c.states[0])[0].T
    rows = {"y": slice(0, 2), "q": slice(2, 5), "k": slice(5, 8), "beta": slice(8, 12)}
    phi_q, phi_k = torch.exp(W[rows["q"]] @ x), torch.exp(W[rows["k"]] @ x)
    phi_q, phi_k = phi_q / phi_q.sum(), phi_k / phi_k.sum()
    after = W.clone()
    for rate, block in zip(torch.sigmoid(W[rows["beta"]] @ x), rows.values(), strict=True):
        after[block] += rate * torch.outer(W[block] @ phi_q - W[block] @ phi_k, phi_k)
    out, state = run(c, 1)
    torch.testing.assert_close(out[0, 0], W[rows["y"]] @ x)
    torch.testing.assert_close((c.inputs[1] + state[0])[0].T, after)


# Ahead of time for sm_90

INDICES = dict.fromkeys(("slots_ptr", "depths_ptr", "offsets_ptr"), "*i64")
STRIDES = dict.fromkeys(("slot_stride", "depth_stride"), "i64")


@pytest.mark.parametrize("grid", [64, 4096], ids=["small_grid", "large_grid"])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("kind", ["kda", "rwkv7"])
def test_delta_compiles_ahead_for_sm_90_without_spills(kind: str, size: int, grid: int) -> None:
    tokens = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "beta_ptr", "a_ptr", "b_ptr", "out_ptr"), "*bf16")
    floats = {**dict.fromkeys(("g_ptr", "pool_ptr"), "*fp32"), "scale": "fp32"}
    chosen = tile("delta", size, size, grid, torch.device("cuda"))
    constexprs = {
        "H": 32, "HQ": 16, "HK": 16, "HG": 32, "K": size, "V": size, "BLOCK_K": size,
        "BLOCK_V": chosen.block_v, "DECAY": 2, "DPLR": kind == "rwkv7",
    }  # fmt: skip
    signature = {**tokens, **floats, **INDICES, **STRIDES}
    options = {"signature": signature, "constexprs": constexprs, "warps": chosen.warps}
    cost = compile_ahead("kernels.delta.step_triton", "delta_step_kernel", options)
    print(f"{kind} {size}x{chosen.block_v}, {chosen.warps} warps: {cost}")
    assert cost["spills"] == 0
    assert cost["vector_loads"] > 0


@pytest.mark.parametrize(("D", "warps"), [(16, 1), (32, 4), (64, 8)])
def test_srwm_compiles_ahead_for_sm_90_without_spills(D: int, warps: int) -> None:
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "weight_ptr": "*fp32", "pool_ptr": "*fp32"}
    constexprs = {"H": 8, "D": D, "E": D, "BLOCK_D": D, "BLOCK_E": D}
    options = {"signature": {**types, **INDICES, **STRIDES}, "constexprs": constexprs, "warps": warps}
    cost = compile_ahead("kernels.delta.srwm.step_triton", "srwm_step_kernel", options)
    assert cost["spills"] == 0
