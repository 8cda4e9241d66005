"""Runs ticks on a model: from row tables to tensors and back. The only part of the engine that knows torch."""

from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.batch import Batch
from models.decoder import Decoder
from models.state import StatePool
from serving.engine.core import Floats, Ints, Sampled, Sequence, Tick
from serving.engine.paths import Node, Path
from serving.engine.rows import Rows
from serving.engine.sampler import Sampler


class Runner(Protocol):
    """What the engine asks of whatever runs its ticks."""

    path: Path
    vocab_size: int

    def admit(self, sequence: Sequence, endings: Seq[int]) -> None:
        """Take a slot into service, its state as before the first token."""

    def fork(self, source: int, target: int) -> None:
        """Give a slot in service the state of another."""

    def release(self, slot: int) -> None: ...

    def run(self, tick: Tick, rows: Rows) -> Sampled | None:
        """Run the tick's stage; a final stage gives tokens for its rows and for the ends of its prompts."""


def path_of(model: Decoder) -> Path:
    """Every stage as often as the model has depths for it."""
    nodes = []
    for stage, part in enumerate(model.stages):
        for depth in range(part.depths):
            nodes.append(Node(stage, depth, units=len(nodes) + 1))
    return Path(tuple(nodes))


class TorchRunner:
    """A model, the states of `slots` sequences, and a sampler."""

    def __init__(self, model: Decoder, slots: int):
        self.model = model
        self.path = path_of(model)
        self.vocab_size = model.vocab_size
        self.pool = StatePool(model.layout(), slots, model.device)
        self.sampler = Sampler(slots, model.vocab_size)

    def admit(self, sequence: Sequence, endings: Seq[int]) -> None:
        request = sequence.request
        self.pool.reset(sequence.slot)
        self.sampler.admit(sequence.slot, request.params, sequence.seed, request.prompt, endings)

    def fork(self, source: int, target: int) -> None:
        self.pool.copy(source, target)

    def release(self, slot: int) -> None:
        self.sampler.release(slot)

    @torch.inference_mode()
    def run(self, tick: Tick, rows: Rows) -> Sampled | None:
        batch = self._batch(tick, rows)
        ids = np.concatenate([rows.token[tick.slots], *(chunk.ids for chunk in tick.chunks)])
        hidden = self.model.embed(self._tensor(ids), batch)
        hidden = self.model.run(tick.stage, hidden, batch, self.pool.layers)
        return self._head(tick, rows, hidden)

    def _batch(self, tick: Tick, rows: Rows) -> Batch:
        lengths = np.ones(len(tick.slots) + len(tick.chunks), np.int64)
        lengths[len(tick.slots) :] = [len(chunk.ids) for chunk in tick.chunks]
        slots = np.concatenate([tick.slots, np.array([c.sequence.slot for c in tick.chunks], np.int64)])
        positions = [rows.position[tick.slots], *(np.arange(c.start, c.start + len(c.ids)) for c in tick.chunks)]
        return Batch(
            slots=self._tensor(slots),
            depths=self._tensor(np.zeros(len(slots), np.int64)),
            offsets=self._tensor(np.concatenate([[0], lengths.cumsum()])),
            positions=self._tensor(np.concatenate(positions)),
        )

    def _head(self, tick: Tick, rows: Rows, hidden: Tensor) -> Sampled:
        """Sample after every decoding row and every prompt's last token; score the chunks that ask for it."""
        at: list[Ints] = [np.arange(len(tick.slots))]  # rows of `hidden` that a token is drawn from
        slots, positions = [tick.slots], [rows.position[tick.slots] + 1]
        scores: dict[int, Floats] = {}
        first = len(tick.slots)
        for chunk in tick.chunks:
            request = chunk.sequence.request
            end = first + len(chunk.ids)
            if request.score:
                scores[chunk.sequence.slot] = self._score(hidden[first:end], request.prompt, chunk.start)
            elif chunk.last:
                copies = [s.slot for s in request.sequences if s.finished is None]
                at.append(np.full(len(copies), end - 1))
                slots.append(np.array(copies))
                positions.append(np.full(len(copies), len(request.prompt)))
            first = end
        all_slots, all_at = np.concatenate(slots), np.concatenate(at)
        if not len(all_at):
            return Sampled(all_slots, all_at, scores=scores)
        logits = self.model.logits(hidden[self._tensor(all_at)])
        ids, *logprobs = self.sampler.sample(logits, all_slots, np.concatenate(positions))
        return Sampled(all_slots, ids, *logprobs, scores=scores)

    def _score(self, hidden: Tensor, prompt: list[int], start: int) -> Floats:
        """Log-probability of the token after each of these, as far as the prompt goes."""
        targets = torch.tensor(prompt[start + 1 : start + 1 + len(hidden)], device=hidden.device)
        logprobs = self.model.logits(hidden[: len(targets)]).log_softmax(-1)
        return logprobs.gather(1, targets[:, None]).squeeze(1).cpu().numpy()  # type: ignore[no-any-return]

    def _tensor(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)
