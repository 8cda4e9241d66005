"""Kernels, organised by the structure of the state transition x' = A x + B u, y = C x.

Each op is a folder: ``naive.py`` (the recurrence as the paper writes it), ``scan.py`` (many tokens at once,
differentiable), ``step_triton.py`` and ``step_numba.py`` (the recurrence in place on a pool of states, on a GPU
and on a CPU, same loops). The package itself exports one function that picks among them.

Every op takes *packed* tokens: the tokens of all segments of a batch, one after the other. ``offsets`` [N+1] says
where each segment begins, ``slots`` [N] and ``depths`` [N] say which state it continues. A decoding batch is N
segments of one token; a prefill chunk is one segment of many.
"""

import os

from kernels.disk_cache import use_disk_cache, use_own_copies

# Numba and torch then share one team of OpenMP threads, rather than each spinning against the other's.
os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
use_disk_cache()
use_own_copies()
