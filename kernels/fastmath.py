"""exp, exp2, sigmoid and SiLU of float32 for numba kernels, written so that LLVM vectorises the loop around
them.

Numba calls the C library's scalar `expf`, some ten times slower. The relative error is below 2e-7 where the
result is a normal float; beyond that the argument is clamped, so that exp gives neither 0 nor inf: exp(-1000)
is 1.2e-38, exp(1000) is 1.7e38. NaN stays NaN.

2^x = 2^n 2^r with n = round(x), |r| <= 1/2. Adding 1.5 * 2^23 rounds x to an integer and leaves n in the low
bits of the sum, from where it is shifted into the exponent of the polynomial's value.
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

_ROUND = np.float32(1.5 * 2**23)
_LOWEST, _HIGHEST = np.float32(-126.0), np.float32(127.0)
_LOWEST_E, _HIGHEST_E = np.float32(-87.33654), np.float32(88.02969)  # the same, times ln 2
_SHIFT = np.int32(23)
_ONE = np.float32(1.0)

# 2^r on [-1/2, 1/2], exact at 0: minimax in the relative error, 9.1e-8 before rounding.
_P1, _P2 = np.float32(0.6931470036506653), np.float32(0.24022242426872253)
_P3, _P4 = np.float32(0.05550733581185341), np.float32(0.009671512991189957)
_P5 = np.float32(0.001326472731307149)
LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts: the high one has 10 bits, so that n * high is exact and x - n ln 2 loses nothing.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)

_L3, _L5, _L7, _L9, _L11, _L13, _L15 = (np.float32(1 / n) for n in range(3, 17, 2))

# The flags of the kernels around (fastmath=True) would let LLVM fold (x + c) - c into x: these allow fused
# multiply-adds only, and keep their own flags when they are inlined.
_FLAGS = {"contract"}


@intrinsic
def _bits(context: Any, x: Any) -> Any:
    """float32 -> int32, the same bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def _float(context: Any, x: Any) -> Any:
    """int32 -> float32, the same bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def wide_vectors(context: Any) -> Any:
    """Called anywhere in a loop nest: vectors of 512 bits there, on a CPU that has them.

    LLVM prefers 256 bits on most such CPUs, for the sake of code with few vector instructions. In a loop full
    of exponentials the wide ones save a third of the time. Inside of a prange the call belongs into its body,
    which becomes a function.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        attributes = builder.function.attributes
        if isinstance(attributes, set):  # llvmlite's own `add` knows only a list of names
            set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


@numba.njit(forceinline=True, fastmath=_FLAGS, error_model="numpy")
def _clamped(x: float, low: float, high: float) -> float:
    """In this order of the comparisons a NaN stays one."""
    x = low if x < low else x
    return high if x > high else x


@numba.njit(forceinline=True, fastmath=_FLAGS, error_model="numpy")
def _scaled(r: float, shifted: float) -> float:
    """2^(n + r), n in the low bits of `shifted`."""
    p = ((((_P5 * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _ONE
    return _float(np.int32(_bits(p) + np.int32(_bits(shifted) << _SHIFT)))


@numba.njit(forceinline=True, fastmath=_FLAGS, error_model="numpy")
def exp2(x: float) -> float:
    """2^x of a float32."""
    x = _clamped(x, _LOWEST, _HIGHEST)
    shifted = x + _ROUND
    return _scaled(x - (shifted - _ROUND), shifted)


@numba.njit(forceinline=True, fastmath=_FLAGS, error_model="numpy")
def exp(x: float) -> float:
    """e^x of a float32."""
    x = _clamped(x, _LOWEST_E, _HIGHEST_E)
    shifted = x * LOG2_E + _ROUND
    n = shifted - _ROUND
    return _scaled(((x - n * _LN2_HIGH) - n * _LN2_LOW) * LOG2_E, shifted)


@numba.njit(forceinline=True, fastmath=_FLAGS, error_model="numpy")
def sigmoid(x: float) -> float:
    return _ONE / (_ONE + exp(-x))


@numba.njit(forceinline=True, fastmath=_FLAGS, error_model="numpy")
def silu(x: float) -> float:
    return x / (_ONE + exp(-x))


@numba.njit(forceinline=True, fastmath=_FLAGS, error_model="numpy")
def softplus(x: float) -> float:
    """log(1 + e^x), to 4e-7 of itself however small it is: x+ + log1p(e^-|x|), with log1p(e) = 2 atanh(e / (2 + e)) as
    a series in s <= 1/3."""
    e = exp(-abs(x))
    s = e / (np.float32(2.0) + e)
    z = s * s
    p = _L15 * z + _L13
    p = (((((p * z + _L11) * z + _L9) * z + _L7) * z + _L5) * z + _L3) * z + _ONE
    return max(x, np.float32(0.0)) + np.float32(2.0) * s * p
