"""``fathom bench snapshots``: what it costs to send each sequence's state to its gateway now and then."""

import time

from serving.bench.measure import report
from serving.config import ModelSpec
from serving.engine.build import build
from serving.engine.core import Request
from serving.engine.engine import Engine
from serving.engine.params import SamplingParams


def run(model: str, batch: int, tokens: int, every: int, rounds: int, threads: int | None) -> None:
    """The same requests with and without snapshots, in turns, in one process."""
    spec = ModelSpec(path=model, slots=batch, prefix_cache_mb=0, threads=threads)
    engine, _, description = build(spec)
    taken: dict[int, list[float]] = {0: [], every: []}
    sent = 0
    for _ in range(rounds + 1):
        for period in (0, every):
            engine.memory.snapshot_tokens = period
            seconds, size = _decode(engine, batch, tokens)
            taken[period].append(seconds)
            sent = size or sent
    without, with_ = (min(taken[period][1:]) for period in (0, every))  # the first round warms up
    cost = with_ / without - 1
    report(
        f"{model}: {batch} sequences of {tokens} tokens, {description.state_bytes_per_sequence / 1e3:.0f} kB of state, "
        f"a snapshot every {every} tokens",
        ("", "tokens/s"),
        [("without", f"{batch * tokens / without:,.0f}"), ("with", f"{batch * tokens / with_:,.0f}")],
        {"bench": "snapshots", "every": every, "megabytes": round(sent / 1e6, 2), "cost": round(cost, 4)},
    )


def _decode(engine: Engine, batch: int, tokens: int) -> tuple[float, int]:
    """Seconds, and bytes of all snapshots."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for i in range(batch):
        # Prompts of different lengths, as in life: their snapshots do not come all at once.
        engine.submit(Request(f"{i}", [1 + i % 100] * (1 + 7 * i % 251), params))
    began, size = time.perf_counter(), 0
    while engine.busy:
        for out in engine.step():
            size += len(out.state.data) if out.state is not None else 0
    return time.perf_counter() - began, size
