"""Shared by all tests. Without a GPU, Triton kernels run in the interpreter: it must be chosen before they are
decorated."""

import os

import torch

if torch.cuda.is_available():
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # of those libraries' kernels that ask for nothing
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FATHOM_THREADS", "1")  # tiny sizes; and each worker of pytest-xdist has a processor

import pytest
from hypothesis import HealthCheck, settings

from kernels.invariance import use_invariance
from serving.threads import use_threads

settings.register_profile(
    "fathom", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fathom")
use_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    use_invariance(False)  # a switch of the process, which an LLM of another test may have turned
