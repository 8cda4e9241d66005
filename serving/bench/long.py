"""``fathom bench long``: latency and memory at token 1,000 and at token 100,000."""

import statistics
import time
from pathlib import Path

from rich.progress import track

from models.load import load
from serving.bench.measure import report
from serving.engine.core import Request
from serving.engine.params import SamplingParams
from serving.llm import LLM

WINDOW = 1000


def run(model: str, tokens: int, dtype: str, threads: int | None) -> None:
    """One sequence really decodes `tokens` tokens. Its latency there is compared, step by step in turn, with that of
    another sequence which is at token 1,000 then, so that both see the same machine."""
    loaded = load(model, dtype)
    old, young = (LLM(loaded, slots=1, threads=threads, progress=False) for _ in range(2))
    _start(old, tokens + 2 * WINDOW)
    for _ in range(WINDOW):
        old.engine.step()
    memory_before = resident()
    for _ in track(range(tokens - 2 * WINDOW), description="decoding", transient=True):
        old.engine.step()
    memory_after = resident()
    _start(young, tokens)
    for _ in range(WINDOW - WINDOW // 2):
        young.engine.step()
    early, late = [], []
    for _ in range(WINDOW):
        early.append(_step(young))
        late.append(_step(old))
    latency = statistics.median(late) / statistics.median(early)
    memory = memory_after / memory_before
    state = loaded.model.layout().bytes_per_slot
    report(
        f"{model}: one sequence, {state / 1e3:,.0f} kB of state",
        ("token", "ms a token", "resident memory, MB"),
        (
            ("1,000", f"{1e3 * statistics.median(early):.3f}", f"{memory_before / 1e6:,.1f}"),
            (f"{tokens:,}", f"{1e3 * statistics.median(late):.3f}", f"{memory_after / 1e6:,.1f}"),
        ),
        {"bench": "long", "latency_ratio": round(latency, 4), "memory_ratio": round(memory, 4)},
    )


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
