"""mLSTM: naive = scan = numba steps = Triton steps = transformers' xLSTM, from fresh and from used states."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kernels.outer.mlstm import _on_cpu, _on_gpu, mlstm, mlstm_naive, mlstm_scan
from tests.kernels.compile_ahead import compile_ahead
from tests.kernels.pools import poisoned_pool, untouched

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
State = tuple[Tensor, Tensor, Tensor]
SCALE = 0.4


def inputs(lengths: list[int], H: int, K: int, V: int, gate: float = 3.0) -> tuple[Inputs, State, Tensor]:
    """(q, k, v, i, f), states of segments in the middle of their sequences, offsets."""
    torch.manual_seed(sum(lengths) + 7 * K)
    T, N = sum(lengths), len(lengths)
    packed = (
        torch.randn(T, H, K),
        torch.randn(T, H, K),
        torch.randn(T, H, V),
        gate * torch.randn(T, H),
        gate * torch.randn(T, H),
    )
    states = torch.randn(N, H, K, V), torch.randn(N, H, K), torch.randn(N, H)
    return packed, states, torch.tensor([0, *lengths]).cumsum(0)


def naive(packed: Inputs, states: State, offsets: Tensor) -> tuple[Tensor, State]:
    outs, ends = [], []
    for n, (a, b) in enumerate(itertools.pairwise(offsets)):
        q, k, v, i, f = (x[a:b] for x in packed)
        out, end = mlstm_naive(q, k, v, i, f, (states[0][n], states[1][n], states[2][n]), SCALE)
        outs.append(out)
        ends.append(end)
    C, n_, m = (torch.stack(parts) for parts in zip(*ends, strict=True))
    return torch.cat(outs), (C, n_, m)


lengths = st.lists(st.integers(0, 24), min_size=1, max_size=4).filter(any)
sizes = st.integers(1, 9)
gates = st.sampled_from([0.1, 3.0, 30.0])


@given(lengths, st.integers(1, 3), sizes, sizes, gates)
@example([130, 64], 2, 5, 3, 3.0)  # beyond one chunk of the scan
def test_scan_equals_naive(lengths: list[int], H: int, K: int, V: int, gate: float) -> None:
    packed, states, offsets = inputs(lengths, H, K, V, gate)
    got, ends = mlstm_scan(*packed, states, offsets, SCALE)
    expected, expected_ends = naive(packed, states, offsets)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ends, expected_ends, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", [_on_cpu, _on_gpu], ids=["numba", "triton"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 0, 6]], ids=["decode", "mixed"])
@pytest.mark.parametrize("gate", [0.1, 30.0], ids=["soft", "hard"])
def test_steps_equal_naive(implementation, lengths, gate, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    packed, states, offsets = inputs(lengths, 3, 7, 5, gate)
    expected, ends = naive(packed, states, offsets)
    slots, depths = torch.tensor([3, 5, 1, 8])[: len(lengths)], torch.tensor([0, 2, 1, 2])[: len(lengths)]
    pools = [poisoned_pool(x, slots, depths) for x in states]
    monkeypatch.setattr("kernels.outer.mlstm.mlstm_normalise", implementation)
    got = mlstm(*packed, *pools, slots, depths, offsets, scale=SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for pool, end in zip(pools, ends, strict=True):
        torch.testing.assert_close(pool[slots, depths], end, rtol=1e-4, atol=1e-5)
        assert untouched(pool, slots, depths)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), gates)
def test_pieces_equal_the_whole(pieces: list[int], gate: float) -> None:
    packed, _, offsets = inputs([sum(pieces)], 2, 4, 4, gate)
    pools = torch.zeros(2, 1, 2, 4, 4), torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2)
    slots, depths = torch.tensor([1]), torch.tensor([0])
    outs, at = [], 0
    for length in pieces:
        part = [x[at : at + length] for x in packed]
        outs.append(mlstm(*part, *pools, slots, depths, torch.tensor([0, length]), scale=SCALE))
        at += length
    whole = mlstm(*packed, None, None, None, slots, depths, offsets, scale=SCALE)
    torch.testing.assert_close(torch.cat(outs), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "used"])
def test_equals_transformers(fresh: bool) -> None:
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    (q, k, v, i, f), states, _ = inputs([21], 3, 8, 6)
    states = tuple(x.zero_() for x in states) if fresh else states
    lay = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, i, f)]  # [1, H, T, ...]
    expected, ends = xlstm.mlstm_recurrent_sequence_native(
        *lay,
        c_initial=states[0],
        n_initial=states[1],
        m_initial=states[2].unsqueeze(-1),
        return_last_states=True,
        eps=1e-6,
    )
    got, (C, n, m) = mlstm_naive(q, k, v, i, f, (states[0][0], states[1][0], states[2][0]), 8**-0.5)
    torch.testing.assert_close(got, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((C, n, m), (ends[0][0], ends[1][0], ends[2][0, :, 0]), rtol=1e-4, atol=1e-5)


def test_output_does_not_depend_on_the_stabiliser() -> None:
    """C, n and exp(-m) carry a common factor: shifting it changes nothing but the rounding (and eps)."""
    packed, (C, n, m), offsets = inputs([9], 2, 4, 4)
    shifted = C * math.exp(2.0), n * math.exp(2.0), m - 2.0
    expected = mlstm_scan(*packed, (C, n, m), offsets, SCALE)[0]
    got = mlstm_scan(*packed, shifted, offsets, SCALE)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_training_gradient_equals_that_of_the_naive_form() -> None:
    packed, states, offsets = inputs([19], 2, 5, 3)
    doubles = [x.double().requires_grad_() for x in packed]
    zero = tuple(torch.zeros_like(x[0], dtype=torch.float64) for x in states)
    leaves = [x.requires_grad_() for x in packed]
    none = torch.zeros(1, dtype=torch.int64)
    trained = mlstm(*leaves, None, None, None, none, none, offsets, scale=SCALE)
    weight = torch.randn_like(trained)
    got = torch.autograd.grad((trained * weight).sum(), leaves)
    by_naive = _functional_naive(doubles, zero)
    expected = torch.autograd.grad((by_naive * weight).sum(), doubles)
    torch.testing.assert_close(trained, by_naive.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, tuple(x.float() for x in expected), rtol=1e-3, atol=1e-3)


def _functional_naive(packed: list[Tensor], state: tuple[Tensor, ...]) -> Tensor:
    """Without the stabiliser (m = 0 throughout) and without writes in place, in float64."""
    q, k, v, i, f = packed
    C, n, _ = state
    outs = []
    for t in range(q.shape[0]):
        forget, write = f[t].sigmoid()[:, None], i[t].exp()[:, None]
        C = forget[..., None] * C + (write * k[t])[..., None] * v[t][:, None]
        n = forget * n + write * k[t]
        read = (SCALE * (n * q[t]).sum(-1)).abs().clamp_min(1.0)
        outs.append(SCALE * torch.einsum("hkv,hk->hv", C, q[t]) / read[:, None])
    return torch.stack(outs)


@pytest.mark.parametrize("implementation", [_on_cpu, _on_gpu], ids=["numba", "triton"])
def test_slot_index_arithmetic_is_64_bit(implementation) -> None:  # type: ignore[no-untyped-def]
    """The normaliser of a slot beyond 2^31 elements. The pool is virtual memory; little of it is ever
    touched."""
    (q, k, v, i, f), (C, n, m), offsets = inputs([1], 4, 64, 4)
    slot = 2**31 // (4 * 64) + 5
    _expected, (_, n_end, m_end) = naive((q, k, v, i, f), (C, n, m), offsets)
    n_pool, m_pool = torch.empty(slot + 1, 1, 4, 64), torch.empty(slot + 1, 1, 4)
    n_pool[slot, 0], m_pool[slot, 0] = n[0], m[0]
    index = torch.tensor([slot]), torch.tensor([0]), offsets
    implementation(q, k, i, f, n_pool, m_pool, *index, SCALE, 1e-6)
    torch.testing.assert_close(n_pool[slot, 0], n_end[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(m_pool[slot, 0], m_end[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("K", [64, 256])
def test_compiles_ahead_for_sm_90_without_spills(K: int) -> None:
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "i_ptr", "f_ptr"), "*bf16")
    floats = dict.fromkeys(("n_ptr", "m_ptr", "q_out_ptr", "k_out_ptr", "g_out_ptr"), "*fp32")
    indices = dict.fromkeys(("slots_ptr", "depths_ptr", "offsets_ptr"), "*i64")
    strides = {f"{pool}_{axis}_stride": "i64" for pool in "nm" for axis in ("slot", "depth")}
    signature = {**pointers, **floats, **indices, **strides, "scale": "fp32", "eps": "fp32"}
    options = {
        "signature": signature,
        "constexprs": {"H": 8, "K": K, "BLOCK_K": K},
        "warps": 1 if K <= 128 else 2,
    }
    cost = compile_ahead("kernels.outer.step_triton", "mlstm_normalise_kernel", options)
    print(f"K={K}: {cost['registers']} registers, {cost['spills']} bytes spilled")
    assert cost["spills"] == 0
