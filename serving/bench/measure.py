"""What the benchmarks share."""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models.load import LoadedModel, pick_device, pick_dtype, prepare
from models.registry import family
from models.train.loop import initialise


def seconds(
    work: Callable[[], object],
    least: float = 0.5,
    runs: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median time of one call, after a warm-up; at least `runs` calls and `least` seconds of them."""
    work()
    times: list[float] = []
    while len(times) < runs or sum(times) < least:
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def read_seconds(nbytes: int, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time to read so many bytes once, by all threads, from wherever the device keeps a buffer of that size."""
    buffer = torch.ones(max(1, nbytes // 4), device=device)

    def read() -> None:
        buffer.sum()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds(read, clock=clock)


def random_model(raw: dict[str, Any], name: str, dtype: str) -> LoadedModel:
    """A model of random weights, ready to serve, by its configuration; it has no tokenizer."""
    device = pick_device("auto")
    config, model = family(raw, name).build(raw, name)
    initialise(model, seed=0)
    model.to(pick_dtype(dtype, device)).to(device).requires_grad_(False).eval()
    prepare(model)
    return LoadedModel(name, model, config, raw["model_type"], tokenizer=None, fingerprint=name)


def report(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], result: dict[str, Any]) -> None:
    """A table for a person, then a line of JSON for a program."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    print(json.dumps(result))
