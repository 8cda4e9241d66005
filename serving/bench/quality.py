"""``fathom bench quality``: held-out bits per byte against depth, through the engine, as a user's tokens would go."""

import math
from itertools import pairwise
from typing import Any

from models.train import corpus
from serving.bench.measure import report
from serving.engine.core import Request
from serving.engine.depth import DepthPolicy
from serving.engine.params import SamplingParams
from serving.errors import FailedPreconditionError
from serving.llm import LLM

WINDOW = 1024  # tokens; each begins without a past


def run(model: str, depths: list[str], size: int, threads: int | None) -> None:
    """The first `size` bytes of each held-out file that is long enough, in windows."""
    llm = LLM(model, dtype="float32", slots=16, threads=threads, prefix_cache_mb=0, progress=False)
    if llm.tokenizer is None:
        raise FailedPreconditionError(f"{model} has no tokenizer.json")
    windows = _windows(llm, size)
    scored = sum(len(llm.tokenizer.decode(w[1:]).encode()) for w in windows)
    rows: list[dict[str, Any]] = []
    for depth in depths:
        nats, mean_depth, saved = _scored(llm, windows, DepthPolicy.parse(depth))
        bits = round(nats / math.log(2) / scored, 4)
        rows.append({"depth": depth, "bits_per_byte": bits, "mean_depth": mean_depth, "flops_saved": saved})
    report(
        f"{model}: {scored:,} held-out bytes in windows of {WINDOW} tokens",
        ("depth", "bits/byte", "mean depth", "FLOPs saved"),
        (
            (r["depth"], f"{r['bits_per_byte']:.3f}", f"{r['mean_depth']:.2f}", f"{r['flops_saved']:.1%}")
            for r in rows
        ),
        {"bench": "quality", "model": model, "bytes": scored, "rows": rows},
    )


def _windows(llm: LLM, size: int) -> list[list[int]]:
    windows = []
    for text in corpus.read().held_out:
        ids = llm.encode(text[:size])
        starts = [*range(0, len(ids), WINDOW), len(ids)]
        windows += [ids[a:b] for a, b in pairwise(starts) if b - a > 1]
    return windows


def _scored(llm: LLM, windows: list[list[int]], policy: DepthPolicy) -> tuple[float, float, float]:
    """Nats of all tokens but each window's first, their mean depth, and the share of FLOPs that they did without."""
    engine = llm.engine
    for number, ids in enumerate(windows):
        engine.submit(Request(str(number), ids, SamplingParams(depth=policy), score=True))
    nats, units, count, saved = 0.0, 0, 0, 0.0
    while engine.busy:
        for out in engine.step():
            nats -= sum(out.logprobs)
            units += sum(out.depths)
            count += len(out.depths)
            if out.usage is not None:
                saved += out.usage.flops_saved * out.usage.prompt_tokens
    return nats, round(units / count, 3), round(saved / sum(map(len, windows)), 4)
