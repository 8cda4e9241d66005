"""Tests of Triton kernels: in the interpreter, or, where there is a GPU, on it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest, _seed: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test of a Triton kernel makes, and the tensors of its module, are where that kernel can reach them."""
    on_gpu = torch.cuda.is_available() and "triton" in request.node.name
    device = torch.device("cuda" if on_gpu else "cpu")
    for name, value in vars(request.module).items():
        if isinstance(value, torch.Tensor):
            monkeypatch.setattr(request.module, name, value.to(device))
    with device:
        yield
