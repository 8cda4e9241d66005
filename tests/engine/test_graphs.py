"""CUDA graphs: padding, on a CPU; capture and replay, on a CUDA device (not run where there is none)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.batch import Batch
from models.load import load
from models.state import StatePool
from serving import LLM, SamplingParams
from serving.engine.graphs import LARGEST, HostCopy, StageGraphs, bucket, pad_batch
from tests import tiny


def test_buckets_are_few_and_near() -> None:
    sizes = [bucket(n) for n in range(1, LARGEST + 1)]
    assert all(n <= size <= 2 * n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) <= 16 and bucket(24) == 24 and bucket(33) == 48 and bucket(5) == 8


def test_padded_rows_change_nothing_for_the_others(tmp_path: Path) -> None:
    model = load(tiny.checkpoint(tmp_path, tiny.LOOPED, text=False), dtype="float32", device="cpu").model
    ids, slots, depths = torch.tensor([3, 7, 9]), torch.tensor([4, 1, 2]), torch.tensor([0, 2, 1])
    batch = Batch(slots, depths, torch.arange(4), torch.tensor([5, 0, 2]), seeds=torch.tensor([1, 2, 3]))
    made = []
    for size in (3, 8):
        pool = StatePool(model.layout(), 4)
        pool.arena.copy_(torch.randn(pool.arena.shape, generator=torch.Generator().manual_seed(1)))
        padded, rows = pad_batch(batch, model.embed(ids), size)
        out = [model.run(stage, rows, padded, pool.layers)[:3] for stage in (0, 1)]
        made.append((*out, pool.arena[1:]))
    for whole, alone in zip(*made, strict=True):
        torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)  # BLAS adds up in another order


def test_only_decoding_batches_on_a_device_are_replayed() -> None:
    batch = Batch.of_sequences([1, 1])
    graphs = StageGraphs(None, ())  # type: ignore[arg-type]
    assert not graphs.can_use(0, batch) and not graphs.can_use(0, replace(batch, width=0.5))
    assert HostCopy(torch.arange(3)).wait().tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_stages_give_the_same_tokens(tmp_path: Path) -> None:
    """At batch sizes that share buckets, rows at a mix of depths; the CPU is the reference."""
    folder = tiny.checkpoint(tmp_path, tiny.LOOPED, text=False)
    prompts = [[i + 1, 2 * i + 1] for i in range(11)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, depth="gate(0.7)")
    made = [
        LLM(folder, dtype="float32", device=device, slots=11).generate(prompts, params)
        for device in ("cuda", "cpu")
    ]
    for on_gpu, on_cpu in zip(*made, strict=True):
        assert (on_gpu.token_ids, on_gpu.depths) == (on_cpu.token_ids, on_cpu.depths)
