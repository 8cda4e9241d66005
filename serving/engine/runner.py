"""Runs ticks on a model: from row tables to tensors and back. The only part of the engine that knows torch."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.pool import tensor_of
from models import snapshots
from models.batch import Batch
from models.decoder import Decoder
from models.depth import signals as measures
from models.paging import PAGE, pages_for
from models.paths import NOWHERE, Path
from models.state import Snapshot, StatePool
from serving.engine.core import Chunk, Ints, Result, Sampled, Sequence, Tick
from serving.engine.depth import ABOUT_PREDICTIONS, CONVERGENCE, DepthPolicy
from serving.engine.graphs import HostCopy, StageGraphs
from serving.engine.parking import Parking
from serving.engine.paths import PathTable
from serving.engine.policy_paths import path_of
from serving.engine.prefix import Saved
from serving.engine.rows import Rows
from serving.engine.sampler import Sampler
from serving.errors import DataLossError, FailedPreconditionError


@dataclass(frozen=True, slots=True)
class SavedState:
    """The state of one sequence, apart from any pool."""

    slots: list[Snapshot]  # of each slot that it held
    entries: list[Ints]  # by stage: what each had appended, [slots, depths]

    @property
    def nbytes(self) -> int:
        return sum(snapshot.nbytes for snapshot in self.slots)


class TorchRunner:
    """A model, the states of `slots` sequences, and a sampler."""

    def __init__(
        self,
        model: Decoder,
        slots: int,
        *,
        max_tokens: int = 0,
        token_capacity: int | None = None,
        fingerprint: str = "",
    ):
        """`token_capacity`: entries of growing state of all sequences together, by default `slots` sequences of
        `max_tokens`; neither matters to a model whose state is constant. `fingerprint`: what the snapshots that it
        reads have to agree in."""
        self.model = model
        self._fingerprint = fingerprint
        self.vocab_size = model.vocab_size
        stages = [node.stage for node in model.path().nodes]
        self.first_stage = None if stages.count(stages[0]) > 1 else stages[0]
        self.final_stages = frozenset(i for i, stage in enumerate(model.stages) if stage.head)
        self.default_depth = DepthPolicy.parse(model.default_depth)
        layout = model.layout()
        self.token_capacity = None
        if layout.paged:
            self.token_capacity = token_capacity or slots * PAGE * pages_for(max_tokens)
        self.fills = model.fills
        self.draws = model.draws
        self.one_by_one = frozenset(ABOUT_PREDICTIONS if model.predicts_through is not None else ())
        self.pool = StatePool(
            layout,
            slots,
            model.device,
            tokens=self.token_capacity or 0,
            longest=max_tokens,
            dtype=model.dtype,
        )
        self._graphs = StageGraphs(model, self.pool.layers)
        self.sampler = Sampler(slots, model.vocab_size)
        # Entries that each stage has appended, by slot and depth: the counts in the arena, without asking a GPU.
        deepest = max(node.depth for node in model.path().nodes) + 1
        self._entries = [np.zeros((slots + 1, deepest), np.int64) for _ in model.stages if layout.paged]
        # Rows that wait between two stages; a model of one stage has none.
        waiting = slots + 1 if len(model.stages) > 1 else 0
        self._device = model.device
        self._host = model.device.type == "cpu"
        self._parked = Parking(waiting, model.row_width, model.row_dtype, self._device)
        most = slots * len(model.path().nodes)  # passes of rows in one call: of each, those that it skips
        self._ones, self._everything = np.ones(most, np.int64), np.arange(most)
        offsets = np.arange(most + 1)
        self._offsets = lru_cache(maxsize=1024)(lambda count: self._tensor(offsets[: count + 1]))

    def path(self, policy: DepthPolicy) -> Path:
        return path_of(self.model, policy)

    def flops(self, path: Path, units: float | None = None, reach: float | None = None) -> float:
        return self.model.flops(path, units, reach)

    def admit(self, sequence: Sequence, endings: Seq[int]) -> None:
        request = sequence.request
        for slot in sequence.slots.tolist():
            self.pool.reset(slot)
            for entries in self._entries:
                entries[slot] = 0
        self.sampler.admit(
            sequence.slot,
            request.params,
            sequence.seed,
            request.prompt,
            endings,
            request.matcher,
            request.resumed,
        )

    def fork(self, source: Sequence, target: Sequence) -> None:
        for a, b in zip(source.slots.tolist(), target.slots.tolist(), strict=True):
            self.pool.copy(a, b)
            for entries in self._entries:
                entries[b] = entries[a]

    def save(self, sequence: Sequence, above: Saved | None) -> SavedState:
        slots = sequence.slots.tolist()
        earlier = above.slots if isinstance(above, SavedState) else [None] * len(slots)
        states = [self.pool.read(slot, a) for slot, a in zip(slots, earlier, strict=True)]
        return SavedState(states, [entries[sequence.slots].copy() for entries in self._entries])

    def load(self, sequence: Sequence, chain: Seq[Saved]) -> None:
        states = cast("Seq[SavedState]", chain)
        for i, slot in enumerate(sequence.slots.tolist()):
            self.pool.write(slot, [saved.slots[i] for saved in states])
        for mine, saved in zip(self._entries, states[-1].entries, strict=True):
            mine[sequence.slots] = saved

    def export(self, sequence: Sequence, about: dict[str, Any]) -> Callable[[], bytes]:
        saved = self.save(sequence, None)
        about = {**about, "entries": [e.tolist() for e in saved.entries]}
        return partial(snapshots.to_bytes, [s.cpu() for s in saved.slots], self._fingerprint, about)

    def parse(self, snapshot: bytes) -> tuple[SavedState, dict[str, Any]]:
        try:
            states, about = snapshots.from_bytes(snapshot, self._fingerprint)
        except snapshots.ForeignSnapshotError as error:
            raise FailedPreconditionError(str(error)) from None
        except snapshots.DamagedSnapshotError as error:
            raise DataLossError(str(error)) from None
        return SavedState(states, [np.array(e, np.int64) for e in about["entries"]]), about

    def release(self, sequence: Sequence) -> None:
        for slot in sequence.slots.tolist():
            self.pool.release(slot)
        self.sampler.release(sequence.slot)

    @torch.inference_mode()
    def run(self, tick: Tick, rows: Rows, paths: PathTable) -> Result:
        batch = self._batch(tick, rows, paths)
        before = self._enter(tick, rows)
        after = self._pass(tick.stage, before, batch)
        if tick.final:
            return Result(sampled=self._head(tick, rows, after))
        signals = {}
        if tick.wanted:
            successive = any(name in CONVERGENCE for name in tick.wanted)
            first_exit = self._first_exit(tick, rows, paths) if successive else None
            signals = self._signals(tick, first_exit, before, after, batch)
        self._park(tick, after)
        return Result({name: copy.wait() for name, copy in signals.items()})

    def _pass(self, stage: int, rows: Tensor, batch: Batch) -> Tensor:
        """Rows through a stage."""
        if self._graphs.can_use(stage, batch):
            return self._graphs.run(stage, rows, batch)
        return self.model.run(stage, rows, batch, self.pool.layers)

    @torch.inference_mode()
    def skip(self, tick: Tick, skipped: list[tuple[int, Ints, Ints]], rows: Rows) -> None:
        """Decoding rows have left early: write, at what they skip, the state that later tokens will look for.
        `skipped`: a stage, the slots, and the depth of each there. (Tokens of chunks pass along as ghosts.)"""
        for stage, slots, depths in skipped:
            batch = self._single(stage, slots, slots, depths, rows)
            self.model.fill(stage, self._parked.take(slots), batch, self.pool.layers)

    def _batch(self, tick: Tick, rows: Rows, paths: PathTable) -> Batch:
        """What the tick works on, with room for what it appends."""
        if not tick.chunks:
            held = rows.held(tick.slots, tick.places, paths.occurrence)
            width = self._width(paths, rows, tick.slots, self._ones[: len(held)])
            return self._single(tick.stage, tick.slots, held, paths.depth.take(tick.places), rows, width)
        owners = np.concatenate([tick.slots, np.array([c.sequence.slot for c in tick.chunks], np.int64)])
        nodes = np.concatenate([tick.nodes, np.array([c.node for c in tick.chunks], np.int64)])
        tokens = [chunk.passing for chunk in tick.chunks]
        lengths = np.ones(len(owners), np.int64)
        lengths[len(tick.slots) :] = [len(t) for t in tokens]
        positions = [
            rows.position[tick.slots],
            *(c.start + t for c, t in zip(tick.chunks, tokens, strict=True)),
        ]
        ghosts = [
            np.zeros(len(tick.slots), bool),
            *(~np.isin(t, c.active) for c, t in zip(tick.chunks, tokens, strict=True)),
        ]
        any_ghosts = any(g.any() for g in ghosts[1:])
        places = paths.places(rows.path[owners], nodes)
        held, depths = rows.held(owners, places, paths.occurrence), paths.depth[places]
        self._grow(tick.stage, held, depths, lengths)
        return Batch(
            slots=self._tensor(held),
            depths=self._tensor(depths),
            offsets=self._tensor(np.concatenate([[0], lengths.cumsum()])),
            positions=self._tensor(np.concatenate(positions)),
            seeds=self._tensor(rows.seed[owners].view(np.int64)) if self.draws else None,
            ghosts=self._tensor(np.concatenate(ghosts)) if any_ghosts else None,
            width=self._width(paths, rows, owners, lengths),
        )

    def _single(
        self, stage: int, slots: Ints, held: Ints, depths: Ints, rows: Rows, width: float | Tensor = 1.0
    ) -> Batch:
        """One token of each row, whose state is `held` by its slot or another one of its sequence, at these depths."""
        count = len(slots)
        self._grow(stage, held, depths, self._ones[:count])
        at, deep, positions = self._tensors(held, depths, rows.position.take(slots))
        seeds = self._tensor(rows.seed.take(slots).view(np.int64)) if self.draws else None
        return Batch(at, deep, self._offsets(count), positions, seeds, width=width)

    def _width(self, paths: PathTable, rows: Rows, slots: Ints, lengths: Ints) -> float | Tensor:
        """Of all tokens where they agree; of each [T] otherwise."""
        if self.model.widths == (1.0,):
            return 1.0
        widths = paths.widths(rows.path[slots])
        if (widths == widths[0]).all():
            return float(widths[0])
        return self._tensor(widths.repeat(lengths)).to(self.model.dtype)

    def _grow(self, stage: int, slots: Ints, depths: Ints, lengths: Ints) -> None:
        """Find pages for the entries that this tick appends: so many at each slot and depth. Not a number of it has to
        come back from the device."""
        if not self._entries:
            return
        for group, appended in self.model.appends(stage, torch.from_numpy(depths)).items():
            at = appended.numpy()
            live = (slots > 0) & (at >= 0)
            there = slots[live], at[live]
            self._entries[stage][there] += lengths[live]
            self.pool.pages[group].reach(*there, self._entries[stage][there])

    def _make_room(self, index: Tensor, batch: Batch) -> None:
        """Find pages for entries that intermediate predictions append, and take back, at the final stage."""
        stage = self.model.predicts_through
        if stage is None:
            return
        probe = batch.alone(index).at_depth(0)
        slots = probe.slots.cpu().numpy()
        for group, depths in self.model.appends(stage, probe.depths).items():
            at = depths.cpu().numpy()
            self.pool.pages[group].reach(slots, at, self._entries[stage][slots, at] + 1)

    def _enter(self, tick: Tick, rows: Rows) -> Tensor:
        """The rows [T, row_width] that the stage works on: embedded where they begin, as they were parked elsewhere."""
        if not tick.chunks:
            return self._enter_rows(tick, rows)
        tokens = [chunk.passing for chunk in tick.chunks]
        fresh = [
            tick.nodes == 0,
            *(np.full(len(t), c.node == 0) for c, t in zip(tick.chunks, tokens, strict=True)),
        ]
        ids = [rows.token[tick.slots], *(c.ids[t] for c, t in zip(tick.chunks, tokens, strict=True))]
        begins, all_ids = np.concatenate(fresh), np.concatenate(ids)
        if begins.all():
            return self.model.embed(self._tensor(all_ids))
        parked = self._parked.take(tick.slots)
        width = self.model.row_width
        waited = (parked.new_empty(len(c.ids), width) if c.rows is None else c.rows for c in tick.chunks)
        entering = torch.cat([parked, *(r[self._tensor(t)] for r, t in zip(waited, tokens, strict=True))])
        if begins.any():
            entering[self._tensor(begins)] = self.model.embed(self._tensor(all_ids[begins]))
        return entering

    def _enter_rows(self, tick: Tick, rows: Rows) -> Tensor:
        """The same where no prompt is on its way."""
        if tick.begin == len(tick.slots):
            return self.model.embed(self._tensor(rows.token[tick.slots]))
        if tick.begin:
            begins = tick.slots[tick.nodes == 0]
            self._parked.put(begins, self.model.embed(self._tensor(rows.token[begins])))
        return self._parked.take(tick.slots)

    def _park(self, tick: Tick, after: Tensor) -> None:
        """Keep what the stage made of its rows until their next one."""
        first = len(tick.slots)
        self._parked.put(tick.slots, after[:first] if tick.chunks else after)
        for chunk in tick.chunks:
            tokens = chunk.passing
            made = after[first : first + len(tokens)]
            first += len(tokens)
            if len(tokens) == len(chunk.ids):
                chunk.rows = made
            else:
                chunk.rows[self._tensor(tokens)] = made

    def _first_exit(self, tick: Tick, rows: Rows, paths: PathTable) -> npt.NDArray[np.bool_]:
        """Which of the tick's tokens are at the first exit of their path, with nothing before to compare them
        with."""
        owners, nodes = tick.tokens()
        units = paths.units[paths.places(rows.path[owners], nodes)]
        return units == min(n.units for n in self.model.path().nodes if n.exit_to != NOWHERE and n.units)

    def _signals(
        self,
        tick: Tick,
        first_exit: npt.NDArray[np.bool_] | None,
        before: Tensor,
        after: Tensor,
        batch: Batch,
    ) -> dict[str, HostCopy]:
        """The wanted signals, each for the tokens that want it. `first_exit`: of those that compare two passes."""
        at = self._places(tick)  # of the tick's tokens in the batch, which may have ghosts among them
        signals = {}
        for name, wanting in tick.wanted.items():
            index = self._tensor(at[wanting])
            if name in self.model.signals:
                value = self.model.signal(name, after, index)
            else:
                value = self._measure(name, before, after, index, batch)
                if first_exit is not None and name in CONVERGENCE:
                    value = value.masked_fill(self._tensor(first_exit[wanting]), float("nan"))
            signals[name] = HostCopy(value)
        return signals

    def _places(self, tick: Tick) -> Ints:
        if not tick.chunks:
            return self._everything[: len(tick.slots)]
        parts, first = [np.arange(len(tick.slots))], len(tick.slots)
        for chunk in tick.chunks:
            tokens = chunk.passing
            parts.append(first + np.flatnonzero(np.isin(tokens, chunk.active)))
            first += len(tokens)
        return np.concatenate(parts)

    def _measure(self, name: str, before: Tensor, after: Tensor, index: Tensor, batch: Batch) -> Tensor:
        """Confidence of, or change between, the rows `index` of two successive passes."""
        if name in measures.LATENT:
            size = self.model.hidden_size
            return measures.latent(name, before[index, :size], after[index, :size])
        self._make_room(index, batch)
        if name in measures.ONE_PREDICTION:
            hidden = self.model.intermediate(after, index, batch, self.pool.layers)
            return self.model.confidence(hidden)[:, measures.ONE_PREDICTION[name]]
        logits = self.model.intermediate_logits(after, index, batch, self.pool.layers)
        earlier = self.model.intermediate_logits(before, index, batch, self.pool.layers)
        if name == "argmax":
            return (logits.argmax(-1) == earlier.argmax(-1)).float()
        return measures.change(name, earlier, logits)

    def _head(self, tick: Tick, rows: Rows, hidden: Tensor) -> Sampled:
        """Sample after every decoding row and every prompt's last token; score the chunks that ask for it."""
        if not tick.chunks:
            logits, positions = self.model.logits(hidden), rows.position.take(tick.slots) + 1
            return Sampled(tick.slots, *self.sampler.sample(logits, tick.slots, positions))
        return self._head_with_chunks(tick, rows, hidden)

    def _head_with_chunks(self, tick: Tick, rows: Rows, hidden: Tensor) -> Sampled:
        """The same where prompts come along: not every row of theirs is drawn from."""
        at: list[Ints] = [np.arange(len(tick.slots))]  # rows of `hidden` that a token is drawn from
        slots, positions = [tick.slots], [rows.position[tick.slots] + 1]
        sampled = Sampled(tick.slots, tick.slots)
        first = len(tick.slots)
        for chunk in tick.chunks:
            request = chunk.sequence.request
            end = first + len(chunk.ids)
            if request.score:
                self._score(hidden[first:end], chunk, sampled)
            elif request.embed:
                self._embed(hidden[first:end], chunk, sampled)
            elif chunk.last:
                copies = [s.slot for s in request.sequences if s.finished is None]
                at.append(np.full(len(copies), end - 1))
                slots.append(np.array(copies))
                positions.append(np.full(len(copies), len(request.given)))
            first = end
        all_slots, all_at = np.concatenate(slots), np.concatenate(at)
        if not len(all_at):
            return sampled
        logits = self.model.logits(hidden[self._tensor(all_at)])
        drawn = self.sampler.sample(logits, all_slots, np.concatenate(positions))
        sampled.slots = all_slots
        sampled.ids, sampled.logprobs, sampled.top_ids, sampled.top_logprobs = drawn
        return sampled

    def _score(self, hidden: Tensor, chunk: Chunk, sampled: Sampled) -> None:
        """Log-probability of the token after each of these, as far as the prompt goes, and of the likeliest
        ones instead, where asked for."""
        request, slot = chunk.sequence.request, chunk.sequence.slot
        targets = torch.tensor(
            request.prompt[chunk.start + 1 : chunk.start + 1 + len(hidden)], device=hidden.device
        )
        logprobs = self.model.logits(hidden[: len(targets)]).log_softmax(-1)
        sampled.scores[slot] = logprobs.gather(1, targets[:, None]).squeeze(1).cpu().numpy()
        if request.params.logprobs:
            values, ids = logprobs.topk(min(request.params.logprobs, self.vocab_size))
            sampled.score_tops[slot] = ids.cpu().numpy(), values.cpu().numpy()

    def _embed(self, hidden: Tensor, chunk: Chunk, sampled: Sampled) -> None:
        """The sum of a chunk's normed hidden vectors, or its share of the last one: in float64, so that where
        a prompt is cut does not show."""
        mean = chunk.sequence.request.embed == "mean"
        rows = hidden if mean else hidden[-1:] if chunk.last else hidden[:0]
        sampled.embeddings[chunk.sequence.slot] = self.model.normed(rows).double().sum(0).cpu().numpy()

    def _tensors(self, *arrays: npt.NDArray[Any]) -> Iterable[Tensor]:
        """Of arrays of one size and type, by one copy to the device."""
        return map(tensor_of, arrays) if self._host else self._tensor(np.stack(arrays)).unbind(0)

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        if self._host:
            return tensor_of(array)
        return torch.from_numpy(array).to(self._device, non_blocking=True)
