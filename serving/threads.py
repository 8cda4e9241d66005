"""Processor threads of torch and numba, which share one team."""

import os

import numba
import torch


def use_threads(count: int | None, *, spare: int = 0) -> int:
    """In the calling thread (numba counts for each); by default FATHOM_THREADS, or all processors that this process
    may run on but `spare` ones. Returns the number."""
    count = count or int(os.environ.get("FATHOM_THREADS", "0"))
    count = count or max(1, len(os.sched_getaffinity(0)) - spare)
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    return count
