"""The exponentials of the CPU kernels: as exact as they say, and vectorised."""

from collections.abc import Callable

import numba
import numpy as np
import pytest
import torch

from kernels import fastmath


def vectorised(f: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    @numba.njit(fastmath=True)
    def loop(x: np.ndarray, y: np.ndarray) -> None:
        for i in range(x.shape[0]):
            y[i] = f(x[i])

    def call(x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        loop(x, y)
        return y

    return call


@pytest.mark.parametrize(
    ("name", "low", "high", "exact"),
    [
        ("exp2", -126, 127, np.exp2),
        ("exp", -87.3, 88, np.exp),
        ("sigmoid", -87, 88, lambda x: 1 / (1 + np.exp(-x))),
        ("silu", -80, 88, lambda x: x / (1 + np.exp(-x))),
        ("softplus", -80, 88, lambda x: np.logaddexp(0, x)),
    ],
)
def test_fast_exponentials_are_exact_to_two_ulp(name, low, high, exact) -> None:  # type: ignore[no-untyped-def]
    f = vectorised(getattr(fastmath, name))
    x = np.linspace(low, high, 1_000_001, dtype=np.float32)
    expected = exact(x.astype(np.float64))
    error = np.abs(f(x) - expected) / np.maximum(np.abs(expected), 1e-37)
    assert error.max() < (2e-7 if name.startswith("exp") else 4e-7)
    assert f(np.zeros(1, np.float32))[0] == np.float32(exact(0.0))


def test_fast_exponentials_beyond_the_range_stay_finite_and_keep_nan() -> None:
    edge = np.array([-np.inf, -1e30, -200, 200, 1e30, np.inf, np.nan], np.float32)
    for name in ("exp", "exp2"):
        y = vectorised(getattr(fastmath, name))(edge)
        assert (y[:3] > 0).all() and (y[:3] < 1.2e-38).all()
        assert (y[3:6] > 1.7e38).all() and np.isfinite(y[3:6]).all()
        assert np.isnan(y[6])


def test_wide_vectors_are_used_where_the_cpu_has_them() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no vectors of 512 bits")

    @numba.njit(fastmath=True)
    def loop(x: np.ndarray, y: np.ndarray) -> None:
        fastmath.wide_vectors()
        for i in range(x.shape[0]):
            y[i] = fastmath.exp(x[i])

    loop(np.zeros(3, np.float32), np.zeros(3, np.float32))
    assert "zmm" in next(iter(loop.inspect_asm().values()))
