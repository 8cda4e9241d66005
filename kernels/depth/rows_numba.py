"""What looped models write into a row behind a pass, on CPUs in one call: from torch's operators it is a dozen, which
take the few rows of a decoding step as long as a layer does."""

import numba
import numpy as np

from kernels.depth.step_numba import Floats, Ints
from kernels.fastmath import sigmoid, wide_vectors

SIGMOID, TANH, AS_IT_IS = 0, 1, 2
"""What makes a weight of a router's logit."""

ALONE, RESIDUAL, WEIGHTED, PLAIN = 0, 1, 2, 3
"""How a recursion is added to what it began with, b: x, b + w (x - b), b + w x, b + x."""


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def routed_rows_numba(
    before: Floats,  # [T, at least D + 1]: rows as the recursion was given them, hidden vector and logit
    x: Floats,  # [T, D]: what it made of them
    depths: Ints,  # [T]: the recursion that each has been through; unless ALONE
    function: int,
    alpha: np.float32,
    gating: int,
    temperature: np.float32,
    routers: Floats,  # [R, D]
    everybody: Ints,  # [R]: 1 where a recursion takes every token
    out: Floats,  # [T, D + 2]: hidden vector, logit, and 1 where the token is not to enter
) -> None:
    wide_vectors()
    T, D = x.shape
    for t in range(T):
        made, y = x[t], out[t]
        weight = np.float32(1)
        if gating != ALONE:
            weight = before[t, D]
            if function == SIGMOID:
                weight = sigmoid(weight) * alpha
            elif function == TANH:
                weight = np.tanh(weight) * alpha
        if gating == ALONE:
            for i in range(D):
                y[i] = made[i]
        elif gating == RESIDUAL:
            given = before[t, :D]
            for i in range(D):
                y[i] = given[i] + weight * (made[i] - given[i])
        else:
            given, share = before[t, :D], weight if gating == WEIGHTED else np.float32(1)
            for i in range(D):
                y[i] = given[i] + share * made[i]
        following = 0 if gating == ALONE else min(depths[t] + 1, routers.shape[0] - 1)
        router, logit = routers[following], np.float32(0)
        for i in range(D):
            logit += router[i] * y[i]
        logit /= temperature
        y[D] = logit
        y[D + 1] = np.float32(0) if logit >= 0 or everybody[following] else np.float32(1)


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def gated_rows_numba(
    before: Floats,  # [T, D + 1]: rows as the pass was given them, hidden vector and chance to be there still
    x: Floats,  # [T, D]: what it made of them
    gate: Floats,  # [D]
    bias: np.float32,
    out: Floats,  # [T, D + 1]: hidden vector, and that chance behind the gate
) -> None:
    wide_vectors()
    T, D = x.shape
    for t in range(T):
        made, y = x[t], out[t]
        logit = bias
        for i in range(D):
            logit += gate[i] * made[i]
            y[i] = made[i]
        y[D] = before[t, D] * sigmoid(-logit)
