"""Kernels that numba reads from its cache on disk, in processes that come one after another."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from kernels import disk_cache

STEP = """
import hashlib, sys
import torch
from models.batch import Batch
from models.load import load
from models.state import StatePool
model = load(sys.argv[1], "float32").model
batch = Batch(torch.tensor([1, 2]), torch.zeros(2, dtype=torch.long), torch.arange(3), torch.zeros(2, dtype=torch.long))
pool = StatePool(model.layout(), 2)
with torch.inference_mode():
    rows = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    made = [model.run(0, rows, batch, pool.layers) for _ in range(8)]
print(hashlib.sha256(torch.cat(made).numpy().tobytes()).hexdigest())
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
def test_what_is_read_from_the_disk_is_what_was_compiled(
    name: str, config: dict[str, object], kernel: str, tmp_path: Path
) -> None:
    """Kernels that call others, compiled with them, compiled against older ones, and read: the same to the bit.
    Processes of the third kind have crashed, and had other last bits than those of the first."""
    from tests.models.reference import publish
    from tests.models.small import SMALL

    publish({**SMALL[name], **config}, tmp_path / "model")
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", STEP, str(tmp_path / "model")]

    def run() -> str:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
        return subprocess.run(
            command, check=True, timeout=300, env=environment, stdout=subprocess.PIPE, text=True
        ).stdout

    compiled = run()
    found = list(cache.rglob(kernel))
    assert found
    for file in found:
        file.unlink()
    assert [run(), run()] == [compiled] * 2


def test_each_state_of_the_sources_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel is compiled with those that it calls: one of them may change, and its own file not."""
    monkeypatch.setattr(disk_cache, "HERE", tmp_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    (tmp_path / "op").mkdir()
    chosen = []
    for text in ("x = 1", "x = 2"):
        (tmp_path / "op" / "called.py").write_text(text)
        disk_cache.use_disk_cache()
        chosen.append(Path(numba.config.CACHE_DIR))
        chosen[-1].mkdir(parents=True)
    assert chosen[0] != chosen[1] and not chosen[0].exists() and chosen[1].exists()
    disk_cache.use_disk_cache()
    assert Path(numba.config.CACHE_DIR) == chosen[1] and chosen[1].exists()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "elsewhere"))
    disk_cache.use_disk_cache()
    assert Path(numba.config.CACHE_DIR).parent == tmp_path / "elsewhere" and chosen[1].exists()
