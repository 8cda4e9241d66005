"""``python -m kernels.bench [--only NAME ...] [--units N ...]``: a table, and JSON as the last line."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every kernel agrees with the naive recurrence, 1 elsewhere."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of case names")
    parser.add_argument("--units", nargs="*", type=int, help="batch x heads")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are decorated, that is imported

    from kernels.bench import measure
    from kernels.bench.cases import CASES

    cases = [case for case in CASES if any(part in case.name for part in options.only)]
    if not cases:
        parser.error(f"--only: {options.only} is in none of {', '.join(case.name for case in CASES)}")
    rows: list[measure.Row] = []
    if not torch.cuda.is_available():
        print("No GPU: nothing is timed. Agreement with the naive recurrence, interpreted, small sizes:")
        print(measure.HEAD)
        for case in cases:
            trial = case.build_small()
            rows.append(measure.Row(case.name, 0, measure.check(trial), tolerance=trial.tolerance))
            print(measure.line(rows[-1]), flush=True)
        report = measure.as_json(rows, None, None)
    else:
        device, clock = torch.device("cuda"), measure.DeviceClock()
        copied = measure.copy_bandwidth(clock, device)
        print(f"{torch.cuda.get_device_name()}: a copy moves {copied / 1e9:.0f} GB/s")
        print(measure.HEAD)
        for case in cases:
            for units in options.units or measure.UNITS:
                try:
                    rows.append(measure.measure(case, units, case.build(units, device), copied, clock))
                    print(measure.line(rows[-1]), flush=True)
                except torch.cuda.OutOfMemoryError:
                    print(f"{case.name}: {units} states do not fit")
                torch.cuda.empty_cache()
        report = measure.as_json(rows, torch.cuda.get_device_name(), copied)
    print(json.dumps(report))
    return 0 if report["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
