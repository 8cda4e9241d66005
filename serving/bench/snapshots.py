"""``fathom bench snapshots``: what it costs to take each sequence's state now and then, to send it to its gateway."""

import statistics
import time
from typing import Any

from serving.bench.measure import report
from serving.config import ModelSpec
from serving.engine.build import build
from serving.engine.core import Request, Sequence
from serving.engine.news import StateAfter
from serving.engine.params import SamplingParams
from serving.threads import use_threads


def run(
    model: str,
    batch: int,
    tokens: int,
    every: int | None,
    rounds: int,
    threads: int | None,
    *,
    processor_time: bool = False,
) -> None:
    """The seconds that go into snapshots, of all seconds without them, in one run: with and without in turns would
    tell a machine's moods first. `cost` is what the engine's thread takes for copies of states, `writing` what it takes
    to make bytes of them, which another thread does. `every`: tokens between two; as served where not given. With
    `processor_time` one thread works, and its time on the processor is what counts."""
    clock = time.thread_time if processor_time else time.perf_counter
    threads = use_threads(1 if processor_time else threads)
    engine, _, description = build(
        ModelSpec(path=model, slots=batch, prefix_cache_mb=0, threads=threads, snapshot_tokens=every)
    )
    due, copying, writing, size = engine.memory.due, 0.0, 0.0, 0

    def timed(sequence: Sequence, **how: Any) -> StateAfter | None:
        nonlocal copying, writing, size
        began = clock()
        state = due(sequence, **how)
        if state is not None:
            copied = clock()
            size += len(state.data)
            copying, writing = copying + copied - began, writing + clock() - copied
        return state

    engine.memory.due = timed  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    costs = []
    for _ in range(rounds + 1):
        for i in range(batch):
            # Prompts of different lengths, as in life: their snapshots do not come all at once.
            engine.submit(Request(f"{i}", [1 + i % 100] * (1 + 7 * i % 251), params))
        began, copying, writing, size = clock(), 0.0, 0.0, 0
        while engine.busy:
            engine.step()
        rest = clock() - began - copying - writing
        costs.append((copying / rest, writing / rest))
    cost, written = (statistics.median(share) for share in zip(*costs[1:], strict=True))  # the first warms up
    report(
        f"{model}: {batch} sequences of {tokens} tokens, {description.state_bytes_per_sequence / 1e3:.0f} kB of state, "
        f"a snapshot every {engine.memory.snapshot_tokens} tokens",
        ("MB", "copying, of all other time", "writing, by another thread"),
        [(f"{size / 1e6:.1f}", f"{cost:.2%}", f"{written:.2%}")],
        {
            "bench": "snapshots",
            "every": engine.memory.snapshot_tokens,
            "megabytes": round(size / 1e6, 2),
            "cost": round(cost, 4),
            "writing": round(written, 4),
        },
    )
