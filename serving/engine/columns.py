"""Passes over the columns of rows and paths, compiled: a tick of a small model takes little longer than numpy takes to
go over them a dozen times."""

import numba
import numpy as np
import numpy.typing as npt

from models.paths import NOWHERE
from serving.engine.core import Ints
from serving.engine.depth import ExitReason

IDLE, SEVERAL = -1, -2
FULL_DEPTH = int(ExitReason.FULL_DEPTH)
GOVERNED = int(ExitReason.GOVERNED)
UNREPEATABLE = np.isin(np.arange(max(ExitReason) + 1), [GOVERNED, int(ExitReason.OUT_OF_TIME)])
"""By reason: whether another time the same policy may let the token go deeper."""

NEVER = (1 << 63) - 1

Bools = npt.NDArray[np.bool_]


@numba.njit(cache=True, nogil=True)
def census(
    node: Ints,  # [slots]
    path: Ints,  # [slots]
    since: Ints,  # [slots]
    stage_of: Ints,  # [places]
    longest: int,  # places of a path
    stages: int,
) -> tuple[Ints, int, int, int]:
    """How many rows are parked at each stage [stages]; how many of all have begun their way; at which tick the one was
    parked that has been for longest, and at which stage (-1: there is none)."""
    counts = np.zeros(stages, np.int64)
    begun, oldest, where = 0, NEVER, -1
    for slot in range(node.size):
        if node[slot] != IDLE:
            stage = stage_of[path[slot] * longest + node[slot]]
            counts[stage] += 1
            begun += node[slot] > 0
            if since[slot] < oldest:
                oldest, where = since[slot], stage
    return counts, begun, oldest, where


@numba.njit(cache=True, nogil=True)
def parked(
    stage: int, count: int, now: int, node: Ints, path: Ints, since: Ints, stage_of: Ints, longest: int
) -> tuple[Ints, Ints, Ints, Ints, int]:
    """The `count` rows at a stage: their slots, nodes and places, and for how many ticks before this one each has been
    parked; how many of them begin their way."""
    slots, nodes, places = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    waited = np.empty(count, np.int64)
    found = begin = 0
    for slot in range(node.size):
        if node[slot] != IDLE:
            place = path[slot] * longest + node[slot]
            if stage_of[place] == stage:
                slots[found], nodes[found], places[found] = slot, node[slot], place
                waited[found] = now - 1 - since[slot]
                begin += node[slot] == 0
                found += 1
    return slots, nodes, places, waited, begin


@numba.njit(cache=True, nogil=True)
def single_tokens(
    slots: Ints, places: Ints, depth_of: Ints, position: Ints, seed: npt.NDArray[np.uint64]
) -> Ints:
    """What a batch says of decoding rows: [3, rows], their depths, positions, and the bits of their seeds."""
    out = np.empty((3, slots.size), np.int64)
    for i in range(slots.size):
        out[0, i], out[1, i], out[2, i] = depth_of[places[i]], position[slots[i]], np.int64(seed[slots[i]])
    return out


@numba.njit(cache=True, nogil=True)
def asking(
    owners: Ints,  # [T]
    nodes: Ints,  # [T]
    places: Ints,  # [T]
    units_of: Ints,  # [places]
    exit_of: Ints,  # [places]
    signal: Ints,  # [slots] that their policies look at, or IDLE
    floor: Ints,  # [slots]
    counting: int,
) -> tuple[Ints, Ints, int]:
    """Which tokens a signal decides about; which signal of each, and of all, or SEVERAL. Where a token goes the same
    way whatever a signal says, before its floor and after the last pass, none does, unless that counts passes."""
    tokens, signals = np.empty(owners.size, np.int64), np.empty(owners.size, np.int64)
    count, common = 0, IDLE
    for i in range(owners.size):
        asked, place = signal[owners[i]], places[i]
        if asked == IDLE or exit_of[place] == NOWHERE or exit_of[place] == nodes[i] + 1:
            continue
        if asked == counting or units_of[place] >= floor[owners[i]]:
            tokens[count], signals[count] = i, asked
            common = asked if common in (IDLE, asked) else SEVERAL
            count += 1
    return tokens[:count], signals[:count], common


@numba.njit(cache=True, nogil=True)
def deepest(units: Ints, places: Ints, units_of: Ints) -> Ints:
    """How deep tokens [T] are behind the stage at these places, which were so deep before it."""
    out = np.empty_like(units)
    for i in range(units.size):
        out[i] = max(units[i], units_of[places[i]])
    return out


@numba.njit(cache=True, nogil=True)
def leaving(
    owners: Ints,  # [T] the slot whose policy holds
    places: Ints,  # [T]
    units: Ints,  # [T]
    early: Bools,  # [T] what signals say, or [0] where none was asked for
    governed: Ints,  # [T] depth at which the governor makes each leave, or [0] for none
    exit_of: Ints,  # [places]
    floor: Ints,  # [slots], as the others
    ceiling: Ints,
    full: Ints,
    early_reason: Ints,
    capped_reason: Ints,
) -> tuple[Bools, Ints, bool]:
    """Which tokens leave, and why each goes no deeper; whether another time they all would do the same."""
    leave, reasons = np.zeros(owners.size, np.bool_), np.full(owners.size, FULL_DEPTH, np.int64)
    repeatable = True
    for i in range(owners.size):
        slot = owners[i]
        if exit_of[places[i]] == NOWHERE:
            continue
        if early.size > 0 and early[i] and units[i] >= floor[slot]:
            leave[i], reasons[i] = True, early_reason[slot]
        elif units[i] >= ceiling[slot]:
            leave[i], reasons[i] = True, capped_reason[slot]
        elif governed.size > 0 and governed[i] <= units[i] < full[slot]:
            leave[i], reasons[i] = True, GOVERNED
        repeatable &= not UNREPEATABLE[reasons[i]]
    return leave, reasons, repeatable


@numba.njit(cache=True, nogil=True)
def move(
    slots: Ints,
    nodes: Ints,
    places: Ints,
    leave: Bools,  # [at least rows], as the next
    reasons: Ints,
    exit_of: Ints,
    now: int,
    node: Ints,
    since: Ints,
    reason: Ints,
) -> None:
    """Park rows where they go on."""
    for i in range(slots.size):
        slot = slots[i]
        node[slot] = exit_of[places[i]] if leave[i] else nodes[i] + 1
        since[slot], reason[slot] = now, reasons[i]


@numba.njit(cache=True, nogil=True)
def skipped(
    slots: Ints,
    nodes: Ints,
    places: Ints,
    leave: Bools,  # [rows]
    units: Ints,  # [slots], as the next
    reach: Ints,
    exit_of: Ints,  # [places], as the others
    leads_to: Ints,
    stage_of: Ints,
    depth_of: Ints,
) -> tuple[Ints, Ints, Ints]:
    """The passes that leaving rows do without, as far down as later tokens of their sequences may come: the stage of
    each, its slot, and its depth there. Those of a row rise."""
    count = 0
    for i in range(slots.size):
        if leave[i] and reach[slots[i]] > units[slots[i]]:
            count += exit_of[places[i]] - nodes[i] - 1
    stages, whose, depths = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    found = 0
    for i in range(slots.size):
        if leave[i] and reach[slots[i]] > units[slots[i]]:
            for further in range(1, exit_of[places[i]] - nodes[i]):
                at = places[i] + further
                if leads_to[at] <= reach[slots[i]]:
                    stages[found], whose[found], depths[found] = stage_of[at], slots[i], depth_of[at]
                    found += 1
    return stages[:found], whose[:found], depths[:found]
