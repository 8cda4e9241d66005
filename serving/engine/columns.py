"""Passes over the columns of rows and paths, compiled: a tick of a small model takes little longer than numpy takes to
go over them a dozen times.

Rows are a table [columns, slots], paths one of [fields, places]: each array that a compiled function is given or
returns costs a microsecond.
"""

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

(
    NODE, TOKEN, POSITION, SINCE, UNITS, STREAK, REASON, PATH, SEED, SIGNAL, FLOOR, CEILING, REACH, FULL, SHED, EARLY,
    CAPPED,
) = COLUMNS = range(17)  # fmt: skip
"""Of a table of rows (`engine/rows.py`)."""

STAGE, DEPTH, OCCURRENCE, DEEP, EXIT_TO, LEADS_TO = FIELDS = range(6)
"""Of a table of paths: of models.paths.Node, DEEP for its units, and `leads_to` (`engine/paths.py`)."""

Bools = npt.NDArray[np.bool_]


@numba.njit(cache=True, nogil=True)
def census(rows: Ints, paths: Ints, longest: int, stages: int) -> tuple[Ints, int, int, int]:
    """How many rows are parked at each stage [stages]; how many of all have begun their way; at which tick the one was
    parked that has been for longest, and at which stage (-1: there is none)."""
    counts = np.zeros(stages, np.int64)
    begun, oldest, where = 0, NEVER, -1
    for slot in range(rows.shape[1]):
        node = rows[NODE, slot]
        if node != IDLE:
            stage = paths[STAGE, rows[PATH, slot] * longest + node]
            counts[stage] += 1
            begun += node > 0
            if rows[SINCE, slot] < oldest:
                oldest, where = rows[SINCE, slot], stage
    return counts, begun, oldest, where


@numba.njit(cache=True, nogil=True)
def parked(stage: int, count: int, now: int, rows: Ints, paths: Ints, longest: int) -> tuple[Ints, int]:
    """The `count` rows at a stage, [4, count]: their slots, nodes and places, and for how many ticks before this one
    each has been parked; how many of them begin their way."""
    here = np.empty((4, count), np.int64)
    found = begin = 0
    for slot in range(rows.shape[1]):
        node = rows[NODE, slot]
        if node != IDLE:
            place = rows[PATH, slot] * longest + node
            if paths[STAGE, place] == stage:
                here[0, found], here[1, found], here[2, found] = slot, node, place
                here[3, found] = now - 1 - rows[SINCE, slot]
                begin += node == 0
                found += 1
    return here, begin


@numba.njit(cache=True, nogil=True)
def asking(
    owners: Ints,  # [T]
    nodes: Ints,  # [T]
    places: Ints,  # [T]
    rows: Ints,
    paths: Ints,
    counting: int,
) -> tuple[Ints, int]:
    """Which tokens a signal decides about, and which signal, [2, tokens]; that of all, or SEVERAL. Where a token goes
    the same way whatever a signal says, before its floor and after the last pass, none does, unless that counts
    passes."""
    found, count, common = np.empty((2, owners.size), np.int64), 0, IDLE
    for i in range(owners.size):
        asked, place = rows[SIGNAL, owners[i]], places[i]
        if asked == IDLE or paths[EXIT_TO, place] == NOWHERE or paths[EXIT_TO, place] == nodes[i] + 1:
            continue
        if asked == counting or paths[DEEP, place] >= rows[FLOOR, owners[i]]:
            found[0, count], found[1, count] = i, asked
            common = asked if common in (IDLE, asked) else SEVERAL
            count += 1
    return found[:, :count], common


@numba.njit(cache=True, nogil=True)
def deepest(units: Ints, places: Ints, paths: Ints) -> Ints:
    """How deep tokens [T] are behind the stage at these places, which were so deep before it."""
    out = np.empty_like(units)
    for i in range(units.size):
        out[i] = max(units[i], paths[DEEP, places[i]])
    return out


@numba.njit(cache=True, nogil=True)
def leaving(
    owners: Ints,  # [T] the slot whose policy holds
    places: Ints,  # [T]
    units: Ints,  # [T]
    early: Bools,  # [T] what signals say, or [0] where none was asked for
    governed: Ints,  # [T] depth at which the governor makes each leave, or [0] for none
    rows: Ints,
    paths: Ints,
) -> tuple[Bools, Ints, bool]:
    """Which tokens leave, and why each goes no deeper; whether another time they all would do the same."""
    leave, reasons = np.zeros(owners.size, np.bool_), np.full(owners.size, FULL_DEPTH, np.int64)
    repeatable = True
    for i in range(owners.size):
        slot = owners[i]
        if paths[EXIT_TO, places[i]] == NOWHERE:
            continue
        if early.size > 0 and early[i] and units[i] >= rows[FLOOR, slot]:
            leave[i], reasons[i] = True, rows[EARLY, slot]
        elif units[i] >= rows[CEILING, slot]:
            leave[i], reasons[i] = True, rows[CAPPED, slot]
        elif governed.size > 0 and governed[i] <= units[i] < rows[FULL, slot]:
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
    now: int,
    rows: Ints,
    paths: Ints,
) -> None:
    """Park rows where they go on."""
    for i in range(slots.size):
        slot = slots[i]
        rows[NODE, slot] = paths[EXIT_TO, places[i]] if leave[i] else nodes[i] + 1
        rows[SINCE, slot], rows[REASON, slot] = now, reasons[i]


@numba.njit(cache=True, nogil=True)
def skipped(
    slots: Ints,
    nodes: Ints,
    places: Ints,
    leave: Bools,  # [rows]
    rows: Ints,
    paths: Ints,
) -> Ints:
    """The passes that leaving rows do without, as far down as later tokens of their sequences may come, [3, passes]:
    the stage of each, its slot, and its depth there. Those of a row rise."""
    count = 0
    for i in range(slots.size):
        if leave[i] and rows[REACH, slots[i]] > rows[UNITS, slots[i]]:
            count += paths[EXIT_TO, places[i]] - nodes[i] - 1
    passes, found = np.empty((3, count), np.int64), 0
    for i in range(slots.size):
        if leave[i] and rows[REACH, slots[i]] > rows[UNITS, slots[i]]:
            for further in range(1, paths[EXIT_TO, places[i]] - nodes[i]):
                at = places[i] + further
                if paths[LEADS_TO, at] <= rows[REACH, slots[i]]:
                    passes[0, found], passes[1, found] = paths[STAGE, at], slots[i]
                    passes[2, found] = paths[DEPTH, at]
                    found += 1
    return passes[:, :found]
