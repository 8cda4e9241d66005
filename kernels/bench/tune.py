"""What the table of ``kernels.tiles`` says against every other tile: ``python -m kernels.bench.tune``, on a GPU."""

import argparse
from collections.abc import Iterator, Sequence

import torch

from kernels.bench.case import Case, Trial
from kernels.bench.cases import CASES
from kernels.bench.measure import DeviceClock, check
from kernels.tiles import Tile, force

OPS = ("outer/", "delta/", "diagonal/")
UNITS = (64, 1024, 16384)
REGISTERS = (2, 128)  # numbers of the state that a thread may hold


def candidates(case: Case) -> Iterator[Tile]:
    """Tiles for a case's states, by the numbers that a thread of one would hold."""
    rows = case.size.get("K") or case.size.get("N", 1)
    for block in (4, 8, 16, 32, 64, 128, 256):
        for warps in (1, 2, 4, 8):
            if REGISTERS[0] <= rows * block / (32 * warps) <= REGISTERS[1]:
                yield Tile(block, warps)


def seconds(trial: Trial, tile: Tile, clock: DeviceClock) -> float:
    with force(tile):
        return clock.seconds(trial.step)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.tune", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of case names")
    parser.add_argument("--units", nargs="*", type=int, default=UNITS, help="batch x heads")
    parser.add_argument("--compile", action="store_true", help="only fill the compiler's cache")
    options = parser.parse_args(arguments)
    device, clock = torch.device("cuda"), DeviceClock()
    chosen = [c for c in CASES if c.name.startswith(OPS) and any(part in c.name for part in options.only)]
    for case in chosen:
        for units in options.units:
            trial = case.build(units, device)
            error = check(trial)
            if options.compile:
                for tile in candidates(case):
                    with force(tile):
                        trial.step()
                continue
            table = clock.seconds(trial.step)
            found = sorted(
                (seconds(trial, tile, clock), tile.block_v, tile.warps) for tile in candidates(case)
            )
            best = ", ".join(f"{block} x {warps} warps {table / s:.2f}" for s, block, warps in found[:4])
            note = "" if error <= trial.tolerance else f"  DISAGREES: {error:.0e}"
            print(f"{case.name:24}{units:7}{1e6 * table:10.1f} us; times as fast: {best}{note}", flush=True)


if __name__ == "__main__":
    main()
