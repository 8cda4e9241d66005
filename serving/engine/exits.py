"""Which tokens leave, where they go on, and why: the depth policies, applied to a tick."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from models.paths import NOWHERE
from serving.engine import columns
from serving.engine.core import Chunk, Floats, Ints, Sequence, Tick
from serving.engine.depth import AT_LEAST, DEFAULT_THRESHOLDS, SIGNALS, ExitReason
from serving.engine.governor import Governor
from serving.engine.paths import NO_INTS, PathTable
from serving.engine.rows import IDLE, MANY, Rows

COUNTING = SIGNALS.index("argmax")
NOBODY = np.zeros(0, bool)

Skipped = tuple[int, Ints, Ints]
"""A stage, slots, and the depth of each: passes that rows do without."""


class Exits:
    """Decides for all tokens of a tick at once, by the columns of their sequences."""

    def __init__(
        self,
        rows: Rows,
        paths: PathTable,
        running: Mapping[int, Sequence],
        governor: Governor,
        *,
        min_depth: int | None,
        fills: bool,
        clock: Callable[[], float],
    ):
        """`running`: sequences by their first slot. `min_depth`: the floor of those whose requests have none, while the
        governor sheds. `fills`: tokens that leave early write what they skip."""
        self._rows = rows
        self._paths = paths
        self._running = running
        self._governor = governor
        self._min_depth = min_depth
        self._fills = fills
        self._clock = clock

    def admit(self, sequence: Sequence) -> None:
        """Write the sequence's depth policy into its columns."""
        rows, slot = self._rows, sequence.slot
        policy, path = sequence.request.policy, self._paths[sequence.path]
        low, high = policy.min_depth or 0, policy.max_depth
        rows.path[slot] = sequence.path
        rows.signal[slot] = SIGNALS.index(policy.signal) if policy.signal else IDLE
        if policy.signal:
            given = policy.threshold
            rows.threshold[slot] = DEFAULT_THRESHOLDS.get(policy.signal, 1.0) if given is None else given
        rows.floor[slot] = policy.min_depth or 0
        ceiling = policy.depth or (MANY if high is None else path.deepest(high, low))
        rows.ceiling[slot] = rows.reach[slot] = ceiling
        rows.full[slot] = path.full_depth
        rows.shed[slot] = next(
            (d for d in (policy.min_depth, self._min_depth) if d is not None), path.full_depth
        )
        rows.early[slot], rows.capped[slot] = policy.reason, ExitReason.FIXED_DEPTH

    def want(self, tick: Tick) -> None:
        """Note the signals that decide about the tokens of a tick."""
        rows, paths = self._rows, self._paths
        (tokens, signals), common = columns.asking(*self._tokens(tick), rows.table, paths.table, COUNTING)
        if common == columns.SEVERAL:
            tick.wanted = {SIGNALS[s]: tokens[signals == s] for s in np.unique(signals).tolist()}
        elif len(tokens):
            tick.wanted = {SIGNALS[common]: tokens}

    def decide(self, tick: Tick, signals: dict[str, Floats], now: int) -> list[Skipped]:
        """Apply the depth policies: each token of the tick goes on, or leaves for where its path ends early. Returns
        what decoding rows skip by that and have to write, where tokens do."""
        owners, _, places = self._tokens(tick)
        units = columns.deepest(self._before(tick), places, self._paths.table)
        self._reached(tick, units)
        tick.units = units
        if tick.final:
            return []
        tables = self._rows.table, self._paths.table
        leave, reasons, repeatable = columns.leaving(
            owners, places, units, self._early(tick, owners, signals), self._governed(owners), *tables
        )
        for slot in () if repeatable else owners[columns.UNREPEATABLE[reasons]].tolist():
            self._running[slot].tainted = True
        columns.move(tick.slots, tick.nodes, tick.places, leave, reasons, now, *tables)
        count = len(tick.slots)
        for chunk in tick.chunks:
            part = slice(count, count + len(chunk.active))
            count = part.stop
            chunk.reasons[chunk.active] = reasons[part]
            self._move(chunk, leave[part], self._paths.exit_to[places[part]], now)
        return self._skipped(tick, leave[: len(tick.slots)]) if self._fills else []

    def pace(self, sequence: Sequence, seconds: float) -> None:
        """A sequence that is to be as deep as its deadline allows had its last token after so many seconds: set how
        deep its next one may go."""
        rows, slot, request = self._rows, sequence.slot, sequence.request
        spent = seconds / max(1, int(rows.units[slot]))
        rows.pace[slot] = spent if np.isnan(rows.pace[slot]) else 0.8 * rows.pace[slot] + 0.2 * spent
        if request.deadline is None:
            return
        tokens = request.params.max_tokens - len(sequence.tokens)
        affordable = (request.deadline - self._clock()) / max(1, tokens) / max(rows.pace[slot], 1e-9)
        path, highest = self._paths[sequence.path], min(int(rows.reach[slot]), int(rows.full[slot]))
        rows.ceiling[slot] = path.deepest(min(affordable, highest), request.policy.min_depth or 1)
        short = rows.ceiling[slot] < highest
        rows.capped[slot] = ExitReason.OUT_OF_TIME if short else ExitReason.FIXED_DEPTH

    def _tokens(self, tick: Tick) -> tuple[Ints, Ints, Ints]:
        """For each token of a tick: the slot whose policy holds, its node, and the place of that."""
        owners, nodes = tick.tokens()
        places = self._paths.places(self._rows.path[owners], nodes) if tick.chunks else tick.places
        return owners, nodes, places

    def _early(self, tick: Tick, owners: Ints, signals: dict[str, Floats]) -> columns.Bools:
        """Which tokens have a signal that lets them leave; empty where none was asked for."""
        if not tick.wanted:
            return NOBODY
        early = np.zeros(len(owners), bool)
        if "argmax" in signals:
            signals = {**signals, "argmax": self._streaks(tick, signals["argmax"])}
        for name, tokens in tick.wanted.items():
            value, threshold = signals[name], self._rows.threshold[owners[tokens]]
            early[tokens] = value >= threshold if name in AT_LEAST else value <= threshold
        return early

    def _governed(self, owners: Ints) -> Ints:
        """The depth at which the governor makes tokens leave; empty where it does not."""
        if not self._governor.shed:
            return NO_INTS
        return self._governor.ceilings(self._rows.full[owners], self._rows.shed[owners])

    def _streaks(self, tick: Tick, same: Floats) -> Floats:
        """Count on, for the tokens that want it, how often in a row the prediction has stayed the same."""
        wanting = tick.wanted["argmax"]
        streaks = np.concatenate(
            [self._rows.streak[tick.slots], *(chunk.streaks[chunk.active] for chunk in tick.chunks)]
        )
        streaks[wanting] = np.where(same == 1, streaks[wanting] + 1, 0)
        count = len(tick.slots)
        self._rows.streak[tick.slots] = streaks[:count]
        for chunk in tick.chunks:
            chunk.streaks[chunk.active] = streaks[count : count + len(chunk.active)]
            count += len(chunk.active)
        return streaks[wanting].astype(np.float32)

    def _before(self, tick: Tick) -> Ints:
        """How deep each token of the tick was before it."""
        rows = self._rows.units[tick.slots]
        if not tick.chunks:
            return rows
        return np.concatenate([rows, *(chunk.units[chunk.active] for chunk in tick.chunks)])

    def _reached(self, tick: Tick, units: Ints) -> None:
        """Write down how deep each token of the tick is now."""
        count = len(tick.slots)
        self._rows.units[tick.slots] = units[:count]
        for chunk in tick.chunks:
            chunk.units[chunk.active] = units[count : count + len(chunk.active)]
            count += len(chunk.active)

    def _move(self, chunk: Chunk, leave: npt.NDArray[np.bool_], exit_to: Ints, now: int) -> None:
        """Send a chunk on, without its active tokens that leave."""
        chunk.since = now
        if leave.any():
            chunk.meet = int(exit_to[leave][0])
            chunk.active = chunk.active[~leave]
        leads_to = self._paths.leads_to[self._paths.place(chunk.sequence.path, chunk.node + 1)]
        deeper = leads_to <= self._rows.reach[chunk.sequence.slot]
        chunk.fills = self._fills and bool(deeper)
        chunk.node = chunk.node + 1 if len(chunk.active) or chunk.fills else chunk.meet
        if chunk.node == chunk.meet:
            chunk.active, chunk.meet, chunk.fills = np.arange(len(chunk.ids)), NOWHERE, False

    def _skipped(self, tick: Tick, leave: npt.NDArray[np.bool_]) -> list[Skipped]:
        """The passes that leaving rows do without, as far down as later tokens of their sequences may come."""
        stages, slots, depths = columns.skipped(
            tick.slots, tick.nodes, tick.places, leave, self._rows.table, self._paths.table
        )
        if not len(stages):
            return []
        groups = [(stage, stages == stage) for stage in np.unique(stages).tolist()]
        return [(stage, slots[there], depths[there]) for stage, there in groups]
