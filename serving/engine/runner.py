"""Runs ticks on a model: from row tables to tensors and back. The only part of the engine that knows torch."""

from collections.abc import Sequence as Seq
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.batch import Batch
from models.decoder import Decoder
from models.paths import NOWHERE, Path
from models.state import StatePool
from serving.engine.core import Floats, Ints, Result, Sampled, Sequence, Tick
from serving.engine.depth import DepthPolicy
from serving.engine.paths import PathTable
from serving.engine.rows import Rows
from serving.engine.sampler import Sampler
from serving.errors import InvalidArgumentError


class Runner(Protocol):
    """What the engine asks of whatever runs its ticks."""

    vocab_size: int
    first_stage: int
    final_stages: frozenset[int]
    default_depth: DepthPolicy

    def path(self, policy: DepthPolicy) -> Path:
        """The path of tokens under a policy. Raises InvalidArgumentError for one that the model cannot follow."""

    def admit(self, sequence: Sequence, endings: Seq[int]) -> None:
        """Take a sequence's slots into service, their state as before the first token."""

    def fork(self, source: Sequence, target: Sequence) -> None:
        """Give a sequence in service the state of another."""

    def release(self, slot: int) -> None: ...

    def run(self, tick: Tick, rows: Rows, paths: PathTable) -> Result:
        """Run the tick's stage; a final stage gives tokens for its rows and for the ends of its prompts."""

    def flops(self, units: float) -> float:
        """Floating-point operations of a token that goes so deep."""


class TorchRunner:
    """A model, the states of `slots` sequences, and a sampler."""

    def __init__(self, model: Decoder, slots: int):
        self.model = model
        self.vocab_size = model.vocab_size
        self.first_stage = model.path().nodes[0].stage
        self.final_stages = frozenset(i for i, stage in enumerate(model.stages) if stage.head)
        self.default_depth = DepthPolicy.parse(model.default_depth)
        self.pool = StatePool(model.layout(), slots, model.device)
        self.sampler = Sampler(slots, model.vocab_size)
        # Rows that wait between two stages; a model of one stage has none.
        waiting = slots + 1 if len(model.stages) > 1 else 0
        self._parked = torch.zeros(waiting, model.row_width, dtype=model.dtype, device=model.device)

    def path(self, policy: DepthPolicy) -> Path:
        full = self.model.path()
        exits = any(node.exit_to != NOWHERE for node in full.nodes)
        if policy.kind == "chain":
            raise InvalidArgumentError("depth.chain", policy.layers, "the layers of this model stay in their order")
        if policy.kind not in ("full", "fixed") and not exits:
            raise InvalidArgumentError("depth", policy.kind, "every token of this model takes all of its layers")
        if policy.signal in ("router", "gate") and policy.signal not in self.model.signals:
            raise InvalidArgumentError("depth", policy.kind, f"this model has no {policy.signal}")
        for name, depth in (("fixed", policy.depth), ("min_depth", policy.min_depth), ("max_depth", policy.max_depth)):
            if depth is not None and depth > full.full_depth:
                raise InvalidArgumentError(f"depth.{name}", depth, f"the full depth of this model is {full.full_depth}")
        return full

    def flops(self, units: float) -> float:
        return self.model.flops_per_token(units)

    def admit(self, sequence: Sequence, endings: Seq[int]) -> None:
        request = sequence.request
        for slot in sequence.slots.tolist():
            self.pool.reset(slot)
        self.sampler.admit(sequence.slot, request.params, sequence.seed, request.prompt, endings)

    def fork(self, source: Sequence, target: Sequence) -> None:
        for a, b in zip(source.slots.tolist(), target.slots.tolist(), strict=True):
            self.pool.copy(a, b)

    def release(self, slot: int) -> None:
        self.sampler.release(slot)

    @torch.inference_mode()
    def run(self, tick: Tick, rows: Rows, paths: PathTable) -> Result:
        batch = self._batch(tick, rows, paths)
        before = self._enter(tick, rows)
        after = self.model.run(tick.stage, before, batch, self.pool.layers)
        if tick.final:
            return Result(sampled=self._head(tick, rows, after))
        self._park(tick, after)
        return Result(signals={})

    def _batch(self, tick: Tick, rows: Rows, paths: PathTable) -> Batch:
        lengths = np.ones(len(tick.slots) + len(tick.chunks), np.int64)
        lengths[len(tick.slots) :] = [len(chunk.active) for chunk in tick.chunks]
        slots = np.concatenate([tick.slots, np.array([c.sequence.slot for c in tick.chunks], np.int64)])
        nodes = np.concatenate([tick.nodes, np.array([c.node for c in tick.chunks], np.int64)])
        positions = [rows.position[tick.slots], *(chunk.start + chunk.active for chunk in tick.chunks)]
        return Batch(
            slots=self._tensor(slots),
            depths=self._tensor(paths.look("depth", rows.path[slots], nodes)),
            offsets=self._tensor(np.concatenate([[0], lengths.cumsum()])),
            positions=self._tensor(np.concatenate(positions)),
        )

    def _enter(self, tick: Tick, rows: Rows) -> Tensor:
        """The rows [T, row_width] that the stage works on: embedded where they begin, as they were parked elsewhere."""
        fresh = [tick.nodes == 0, *(np.full(len(chunk.active), chunk.node == 0) for chunk in tick.chunks)]
        ids = np.concatenate([rows.token[tick.slots], *(chunk.ids[chunk.active] for chunk in tick.chunks)])
        begins = np.concatenate(fresh)
        if begins.all():
            return self.model.embed(self._tensor(ids))
        parked = self._parked[self._tensor(tick.slots)]
        width = self.model.row_width
        waited = (parked.new_empty(len(c.ids), width) if c.rows is None else c.rows for c in tick.chunks)
        entering = torch.cat([parked, *(r[self._tensor(c.active)] for r, c in zip(waited, tick.chunks, strict=True))])
        if begins.any():
            entering[self._tensor(begins)] = self.model.embed(self._tensor(ids[begins]))
        return entering

    def _park(self, tick: Tick, after: Tensor) -> None:
        """Keep what the stage made of its rows until their next one."""
        first = len(tick.slots)
        self._parked[self._tensor(tick.slots)] = after[:first]
        for chunk in tick.chunks:
            made = after[first : first + len(chunk.active)]
            first += len(chunk.active)
            if len(chunk.active) == len(chunk.ids):
                chunk.rows = made
            else:
                chunk.rows[self._tensor(chunk.active)] = made

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

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)
