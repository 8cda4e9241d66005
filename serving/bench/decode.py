"""``fathom bench decode``: decoding throughput, and how near it is to reading the weights once a step."""

import torch

from serving.bench.measure import read_seconds, report, seconds
from serving.engine.core import Request
from serving.engine.params import SamplingParams
from serving.llm import LLM


def run(model: str, batches: list[int], dtype: str, threads: int | None) -> None:
    """All sequences decode together; a step includes scheduling and sampling."""
    llm = LLM(model, dtype=dtype, slots=max(batches), threads=threads, progress=False)
    weights = sum(p.nbytes for p in llm.loaded.model.parameters())
    limit = read_seconds(weights, llm.loaded.model.device)
    rows = []
    for batch in batches:
        step = step_seconds(llm, batch)
        rows.append(
            {"batch": batch, "tokens_per_s": round(batch / step, 1), "share_of_limit": round(limit / step, 4)}
        )
    report(
        f"{model}, {llm.loaded.model.dtype}, {weights / 1e6:.1f} MB of weights, {torch.get_num_threads()} threads; "
        f"reading them once takes {1e3 * limit:.2f} ms",
        ("batch", "tokens/s", "ms a step", "share of the limit"),
        (
            (
                str(r["batch"]),
                f"{r['tokens_per_s']:,.0f}",
                f"{1e3 * r['batch'] / r['tokens_per_s']:.2f}",
                f"{r['share_of_limit']:.1%}",
            )
            for r in rows
        ),
        {"bench": "decode", "rows": rows},
    )


def step_seconds(llm: LLM, batch: int) -> float:
    """Median time of a step in which `batch` sequences decode."""
    params = SamplingParams(temperature=0, max_tokens=1 << 19, ignore_eos=True)
    engine = llm.engine
    for i in range(batch):
        engine.submit(Request(f"bench{i}", [i % llm.loaded.model.vocab_size], params))
    while any(len(s.tokens) < 2 for s in engine.scheduler.running.values()) or engine.load().waiting:
        engine.step()
    taken = seconds(engine.step, least=2.0, runs=20)
    for i in range(batch):
        engine.cancel(f"bench{i}")
    return taken
