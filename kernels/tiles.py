"""Tile sizes of the Triton kernels: a small table by device and grid size.

Never `triton.autotune`: it runs a kernel several times to time it, and these kernels update their state in
place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class _Limits:
    elements: int  # of the state in the registers of one program, at most
    narrow: int  # columns of one program in a small grid
    wide: int  # and in a large one
    alone: int  # elements that one warp takes without another
    per_warp: int  # elements of each where there are several


# Delta sums over the rows twice a token: few warps, because sums across warps go through shared memory. A
# diagonal transition is as large as the state and lies in registers as well; its columns are channels, of
# which a warp should load whole lines. Measured by `python -m kernels.bench.tune` (kernels/RESULTS.md).
_LIMITS = {
    "delta": _Limits(8192, narrow=8, wide=64, alone=4096, per_warp=2048),
    "diagonal": _Limits(4096, narrow=8, wide=64, alone=1024, per_warp=1024),
}
_OTHERS = _Limits(16384, narrow=8, wide=64, alone=2048, per_warp=2048)


@dataclass(frozen=True, slots=True)
class Tile:
    block_v: int  # columns of the state that one program owns
    warps: int


class _Forced:
    tile: Tile | None = None


@contextmanager
def force(tile: Tile) -> Iterator[None]:
    """Every launch within takes this tile, whatever the table says: for measuring the table."""
    _Forced.tile = tile
    try:
        yield
    finally:
        _Forced.tile = None


def tile(op: str, rows: int, columns: int, grid: int, device: torch.device) -> Tile:
    """The tile for a state [rows, columns], `grid` such states in the launch.

    A small grid wants narrow tiles, so that every multiprocessor has work; a large one wants tiles wide
    enough for 128-bit loads, and few registers a thread.
    """
    if _Forced.tile is not None:
        return _Forced.tile
    limits = _LIMITS.get(op, _OTHERS)
    widest = max(4, limits.elements // _power(rows))
    wanted = limits.narrow if grid < 256 else limits.wide
    block = min(_power(columns), widest, wanted)
    size = _power(rows) * block
    return Tile(block, warps=1 if size <= limits.alone else size // limits.per_warp)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
