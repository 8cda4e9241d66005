"""``fathom bench long``: latency and memory at token 1,000 and at token 100,000."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from models.load import LoadedModel, load
from serving.bench.measure import random_model, report
from serving.engine.core import Request
from serving.engine.params import SamplingParams
from serving.llm import LLM

WINDOW = 1000

_FRAME: dict[str, Any] = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "eos_token_id": 0}
_MLP: dict[str, Any] = {"intermediate_size": 256}
OPS: dict[str, dict[str, Any]] = {
    "outer": {"model_type": "gla", "num_heads": 2, **_MLP},
    "delta": {"model_type": "gated_deltanet", "num_heads": 2, "head_dim": 32, **_MLP},
    "diagonal": {"model_type": "mamba", "state_size": 16},
    "cell": {"model_type": "lstm", **_MLP},
    "conv": {"model_type": "multiresconv", "depth": 6},
    "attention": {
        "model_type": "samba", "state_size": 8, "attn": {"layers": [1], "num_heads": 2, "window_size": 512}, **_MLP
    },
}  # fmt: skip
"""A small model of random weights for each op; attention is that of a sliding window, whose state is bounded."""


def run(models: Sequence[str], tokens: int, dtype: str, threads: int | None) -> None:
    """Each is a model, or "ops" for those of OPS; the last line has a row for each, and the worst of all."""
    each: dict[str, str | LoadedModel] = {}
    for model in models:
        each |= (
            {op: random_model({**_FRAME, **raw}, op, dtype) for op, raw in OPS.items()}
            if model == "ops"
            else {model: model}
        )
    rows = [_row(name, model, tokens, dtype, threads) for name, model in each.items()]
    report(
        f"one sequence, at token 1,000 and at token {tokens:,}",
        ("model", "state, kB", "ms a token", "ms a token", "resident MB", "resident MB"),
        (
            (
                row["model"],
                f"{row['state_bytes'] / 1e3:,.0f}",
                *(f"{ms:.3f}" for ms in row["ms"]),
                *(f"{size / 1e6:,.1f}" for size in row["resident"]),
            )
            for row in rows
        ),
        {
            "bench": "long",
            "latency_ratio": max(row["latency_ratio"] for row in rows),
            "memory_ratio": max(row["memory_ratio"] for row in rows),
            "rows": [{key: row[key] for key in ("model", "latency_ratio", "memory_ratio")} for row in rows],
        },
    )


def _row(name: str, model: str | LoadedModel, tokens: int, dtype: str, threads: int | None) -> dict[str, Any]:
    """One sequence really decodes `tokens` tokens. Its latency there is compared, step by step in turn, with that of
    another sequence which is at token 1,000 then, so that both see the same machine."""
    loaded = model if isinstance(model, LoadedModel) else load(model, dtype)
    old, young = (LLM(loaded, slots=1, threads=threads, progress=False) for _ in range(2))
    _start(old, tokens + 2 * WINDOW)
    for _ in range(WINDOW):
        old.engine.step()
    memory_before = resident()
    for _ in track(range(tokens - 2 * WINDOW), description=f"{name}: decoding", transient=True):
        old.engine.step()
    memory_after = resident()
    _start(young, tokens)
    for _ in range(WINDOW - WINDOW // 2):
        young.engine.step()
    early, late = [], []
    for _ in range(WINDOW):
        early.append(_step(young))
        late.append(_step(old))
    medians = statistics.median(early), statistics.median(late)
    return {
        "model": name,
        "state_bytes": loaded.model.layout().bytes_per_slot,
        "ms": [1e3 * seconds for seconds in medians],
        "resident": [memory_before, memory_after],
        "latency_ratio": round(medians[1] / medians[0], 4),
        "memory_ratio": round(memory_after / memory_before, 4),
    }


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _start(llm: LLM, tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    llm.engine.submit(Request("long", [1], params))
    llm.engine.step()


def _step(llm: LLM) -> float:
    start = time.perf_counter()
    llm.engine.step()
    return time.perf_counter() - start
