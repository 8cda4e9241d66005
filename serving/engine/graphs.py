"""CUDA graphs: a stage of a decoding batch, captured once for each size and replayed, so that a tick costs one launch.

Only on a CUDA device; everywhere else, and for whatever cannot be captured, stages run as they are. Tests on a CPU are
about padding; those marked `gpu` about capture and replay.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.pool import PADDING_SLOT, Floats, array_of
from models.batch import Batch
from models.decoder import Decoder
from models.state import LayerState

log = logging.getLogger("fathom.engine")

LARGEST = 512
"""Rows of a batch above which a launch no longer matters."""


def bucket(rows: int) -> int:
    """The size to which a batch is padded: powers of two, and halfway between them from 16 on."""
    power = 1 << max(0, rows - 1).bit_length()
    between = 3 * power // 4
    return between if between >= max(16, rows) else power


def pad_batch(batch: Batch, rows: Tensor, size: int) -> tuple[Batch, Tensor]:
    """A batch of single tokens and its rows [N, row_width], filled up with rows of the padding slot to `size`."""

    def filled(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])

    assert PADDING_SLOT == 0, "zeros are the padding slot"
    padded = Batch(
        slots=filled(batch.slots),
        depths=filled(batch.depths),
        offsets=torch.arange(size + 1, device=batch.slots.device),
        positions=filled(batch.positions),
        seeds=None if batch.seeds is None else filled(batch.seeds),
        width=filled(batch.width) if isinstance(batch.width, Tensor) else batch.width,
    )
    return padded, filled(rows)


@dataclass(slots=True)
class Captured:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    rows: Tensor
    out: Tensor


class StageGraphs:
    """The graphs of one model and one pool of states."""

    def __init__(self, model: Decoder, states: Sequence[LayerState]):
        self._model, self._states = model, states
        self._graphs: dict[tuple[int, int], Captured] = {}
        self._eager: set[int] = set()  # stages that cannot be captured
        self._memory: Any = None  # of all graphs: they never run at the same time

    def can_use(self, stage: int, batch: Batch) -> bool:
        """Whether a stage of this batch can be replayed: single tokens on a CUDA device, all of one width."""
        return (
            batch.slots.is_cuda
            and batch.segments == len(batch.positions)
            and batch.ghosts is None
            and 0 < batch.segments <= LARGEST
            and isinstance(batch.width, float)
            and batch.width == 1.0
            and stage not in self._eager
        )

    def run(self, stage: int, rows: Tensor, batch: Batch) -> Tensor:
        """A stage of a batch that `can_use`: rows [N, row_width] -> [N, ...], good until the next call."""
        size = bucket(batch.segments)
        key = stage, size
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(stage, *pad_batch(batch, rows, size))
            except RuntimeError as error:  # it asks the device for a number, or allocates on the host
                log.info("stage %s runs without a CUDA graph: %s", self._model.stages[stage].name, error)
                self._eager.add(stage)
                return self._model.run(stage, rows, batch, self._states)
        return self.replay(self._graphs[key], batch, rows)

    def replay(self, captured: Captured, batch: Batch, rows: Tensor) -> Tensor:
        """Copy a batch into a graph's own, and run it. The rest of its rows work on the padding slot."""
        count = batch.segments
        pairs = [
            (captured.batch.slots, batch.slots),
            (captured.batch.depths, batch.depths),
            (captured.batch.positions, batch.positions),
            (captured.rows, rows),
        ]
        if captured.batch.seeds is not None and batch.seeds is not None:
            pairs.append((captured.batch.seeds, batch.seeds))
        for mine, given in pairs:
            mine[:count].copy_(given, non_blocking=True)
        captured.batch.slots[count:] = PADDING_SLOT
        captured.batch.depths[count:] = 0
        captured.graph.replay()
        return captured.out[:count]

    def _capture(self, stage: int, batch: Batch, rows: Tensor) -> Captured:
        """Once outside, so that kernels are compiled, on the padding slot alone: no state of a sequence moves."""
        padding = replace(batch, slots=torch.zeros_like(batch.slots), depths=torch.zeros_like(batch.depths))
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._model.run(stage, rows, padding, self._states)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            out = self._model.run(stage, rows, padding, self._states)
        self._memory = self._memory or graph.pool()
        return Captured(graph, padding, rows, out)


class HostCopy:
    """A small tensor on its way to the host, without waiting for what is launched after it."""

    def __init__(self, tensor: Tensor):
        self._copy, self._done = tensor, None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Floats:
        """The copy, once it is there."""
        if self._done is not None:
            self._done.synchronize()
        return array_of(self._copy)
