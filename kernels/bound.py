"""Kernels whose arguments are of the same types each time."""

from collections.abc import Callable
from typing import Any

import numba


class Bound:
    """Calls a kernel compiled by numba as it was compiled for the arguments of the first call: later ones must be of
    their types, contiguous where they were. Numba itself looks at the types of all arguments at each call: for 5 to 8
    microseconds where a tuple of weights is among them (1 without), several times that where weights have driven all
    else from the caches. A layer for one token takes no more than a hundred."""

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self._entry: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        if self._entry is None:
            self._entry = self._kernel.compile(tuple(map(numba.typeof, args)))
        self._entry(*args)
