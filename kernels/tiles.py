"""Tile sizes of the Triton kernels: a small table by device and grid size.

Never `triton.autotune`: it runs a kernel several times to time it, and these kernels update their state in place.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    block_v: int  # columns of the state that one program owns
    warps: int


def tile(op: str, rows: int, columns: int, grid: int, device: torch.device) -> Tile:
    """The tile for a state [rows, columns], `grid` such states in the launch.

    A small grid wants narrow tiles, so that every multiprocessor has work; a large one wants tiles wide enough for
    128-bit loads, and few registers a thread.
    """
    widest = max(4, 8192 // _power(rows))  # at most 8192 state elements in registers
    wanted = 8 if grid < 256 else 32
    block = min(_power(columns), widest, wanted)
    return Tile(block, warps=1 if _power(rows) * block <= 1024 else 4)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
