"""Processor threads of torch and numba, which share one team."""

import numba
import torch


def use_threads(count: int) -> None:
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
