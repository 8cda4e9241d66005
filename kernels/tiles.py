"""Tile sizes of the Triton kernels: a small table by device and grid size.

Never `triton.autotune`: it runs a kernel several times to time it, and these kernels update their state in
place.
"""

from dataclasses import dataclass

import torch

# Of one program: state elements in registers, columns in a small and in a large grid. A diagonal transition
# is as large as the state and lies in registers as well; its columns are channels, of which a warp should
# load whole lines.
_MATRIX = (8192, 8, 32)
_LIMITS = {"diagonal": (4096, 32, 128)}


@dataclass(frozen=True, slots=True)
class Tile:
    block_v: int  # columns of the state that one program owns
    warps: int


def tile(op: str, rows: int, columns: int, grid: int, device: torch.device) -> Tile:
    """The tile for a state [rows, columns], `grid` such states in the launch.

    A small grid wants narrow tiles, so that every multiprocessor has work; a large one wants tiles wide
    enough for 128-bit loads, and few registers a thread.
    """
    elements, narrow, wide = _LIMITS.get(op, _MATRIX)
    widest = max(4, elements // _power(rows))
    wanted = narrow if grid < 256 else wide
    block = min(_power(columns), widest, wanted)
    return Tile(block, warps=1 if _power(rows) * block <= 1024 else 4)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
