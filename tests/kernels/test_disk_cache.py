"""Kernels that numba reads from its cache on disk, in processes that come one after another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import sys
import torch
from models.batch import Batch
from models.load import load
from models.state import StatePool
model = load(sys.argv[1], "float32").model
batch = Batch(torch.tensor([1, 2]), torch.zeros(2, dtype=torch.long), torch.arange(3), torch.zeros(2, dtype=torch.long))
pool = StatePool(model.layout(), 2)
with torch.inference_mode():
    assert model.run(0, torch.ones(2, model.hidden_size), batch, pool.layers).isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "kernel"),
    [
        ("mamba", {}, "mixer_numba.*"),
        ("gla", {"use_short_conv": False}, "gla.gla_mixer*"),
        ("gla", {"use_short_conv": False}, "mlp.*"),
    ],
    ids=["Mamba's step", "GLA's mixer", "a gated MLP"],
)
def test_a_kernel_compiled_against_others_from_the_disk(
    name: str, config: dict[str, object], kernel: str, tmp_path: Path
) -> None:
    """Kernels that call others, where those are older than themselves: the next process has crashed."""
    from tests.models.reference import publish
    from tests.models.small import SMALL

    publish({**SMALL[name], **config}, tmp_path / "model")
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", STEP, str(tmp_path / "model")]

    def run() -> None:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
        subprocess.run(command, check=True, timeout=300, env=environment)

    run()
    found = list(cache.rglob(kernel))
    assert found
    for file in found:
        file.unlink()
    run()
    run()
