"""``fathom bench peers``: decoding against transformers' `generate`, of one checkpoint, in one run."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.linear import Blocked
from models.load import LoadedModel, load
from serving.bench.measure import read_seconds, report
from serving.engine.core import Request
from serving.engine.params import SamplingParams
from serving.errors import ServeConfigError
from serving.llm import LLM
from serving.threads import use_threads

Clock = Callable[[], float]

SHAPE: dict[str, Any] = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}
"""Of Mamba-130M."""

WAYS = {
    "": ("float32", "float32", "auto"),
    "int8_": ("float32", "float32", "int8"),
    "stored16_": ("bfloat16", "float32", "auto"),
    "bfloat16_": ("float32", "bfloat16", "auto"),
}
"""By the beginning of their fields: the checkpoint's type, Fathom's, its weights. The last only where the processor
multiplies bfloat16; the third computes what transformers does in float32, from weights of which bfloat16 holds all."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one engine made of one set of prompts."""

    tokens: list[list[int]]
    step: float  # seconds, median


class Theirs:
    """transformers' model, in one type."""

    def __init__(self, folder: Path, dtype: torch.dtype, clock: Clock):
        import transformers

        self.model = transformers.MambaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.clock = clock

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], tokens: int) -> Run:
        """Greedy `generate`; it asks whether to stop after each step, and that is when the clock is read."""
        times: list[float] = []

        def stop(ids: Any, scores: Any, **_: Any) -> torch.Tensor:
            times.append(self.clock())
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(prompts)
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[stop],
        )
        return Run(made[:, ids.shape[1] :].tolist(), _median_gap(times))


class Ours:
    """Fathom's engine on the checkpoint, held in one way."""

    def __init__(self, loaded: LoadedModel, slots: int, threads: int, clock: Clock):
        self.llm = LLM(
            loaded,
            slots=slots,
            threads=threads,
            progress=False,
            prefix_cache_mb=0,
            batch_invariant=False,
        )
        self.bytes = weight_bytes(loaded.model)
        self.clock = clock

    def run(self, prompts: list[list[int]], tokens: int) -> Run:
        """Greedy, through scheduling, sampling and emission. A step hands out a token of each sequence."""
        engine = self.llm.engine
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.submit(Request(f"peers{i}", prompt, params))
        made: dict[str, list[int]] = {f"peers{i}": [] for i in range(len(prompts))}
        times = []
        while engine.busy:
            outputs = engine.step()
            if len(outputs) == len(prompts):
                times.append(self.clock())
            for out in outputs:
                made[out.request_id] += out.ids
        return Run(list(made.values()), _median_gap(times))


def run(
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    threads: int | None,
    shape: dict[str, Any] | None = None,
    *,
    processor_time: bool = False,
) -> None:
    """Both engines take turns on the same prompts, `rounds` times for each batch; a ratio is the median over the
    rounds, so that a machine with other work does both the same wrong.

    `ratio` is that of the float32 model as it is against transformers' quicker type; `int8_ratio` that with weights
    of eight bits; `stored16_ratio` that of the checkpoint once more, rounded to bfloat16. With `processor_time` one
    thread works, and its time on the processor is what counts: on a machine that others keep busy nothing else can be
    compared. Raises ServeConfigError where transformers is not installed.
    """
    clock = time.thread_time if processor_time else time.perf_counter
    threads = use_threads(1 if processor_time else threads)
    with tempfile.TemporaryDirectory() as folder:
        folders = {kind: Path(folder, kind) for kind in ("float32", "bfloat16")}
        publish(folders, shape or SHAPE)
        native = torch.cpu._is_avx512_bf16_supported()
        types = (torch.float32, torch.bfloat16) if native else (torch.float32,)
        theirs = [Theirs(folders["float32"], dtype, clock) for dtype in types]
        rounded = Theirs(folders["bfloat16"], torch.float32, clock)
        ours = {
            way: Ours(load(folders[kind], dtype, "cpu", weights=weights), max(batches), threads, clock)
            for way, (kind, dtype, weights) in WAYS.items()
            if native or dtype != "bfloat16"
        }
        rows = [row(batch, theirs, rounded, ours, tokens, rounds) for batch in batches]
    _show(rows, threads, {way: engine.bytes for way, engine in ours.items()})


def row(
    batch: int, theirs: Sequence[Theirs], rounded: Theirs, ours: dict[str, Ours], tokens: int, rounds: int
) -> dict[str, Any]:
    """`rounded` is transformers on the checkpoint in bfloat16: it takes as long as the first of `theirs`, and is asked
    for its tokens only."""
    generator = torch.Generator().manual_seed(batch)
    vocabulary = next(iter(ours.values())).llm.loaded.model.vocab_size
    prompts = torch.randint(vocabulary, (batch, 8), generator=generator).tolist()
    their_runs: list[list[Run]] = []
    our_runs: dict[str, list[Run]] = {way: [] for way in ours}
    limits: dict[str, list[float]] = {way: [] for way in ours}
    for _ in range(rounds):
        their_runs.append([engine.run(prompts, tokens) for engine in theirs])
        for way, engine in ours.items():
            our_runs[way].append(engine.run(prompts, tokens))
            limits[way].append(read_seconds(engine.bytes, torch.device("cpu"), engine.clock))
    best = [min(r.step for r in runs) for runs in their_runs]
    result: dict[str, Any] = {"batch": batch}
    for name, runs in our_runs.items():
        ratio = statistics.median(b / r.step for b, r in zip(best, runs, strict=True))
        share = statistics.median(a / r.step for a, r in zip(limits[name], runs, strict=True))
        result[f"{name}ratio"], result[f"{name}share_of_limit"] = round(ratio, 3), round(share, 4)
        result[f"{name}ms"] = round(1e3 * statistics.median(r.step for r in runs), 2)
    result["transformers_ms"] = round(1e3 * statistics.median(best), 2)
    reference = their_runs[0][0].tokens
    result["equal_tokens"] = all(r.tokens == reference for r in our_runs[""])
    reference16 = rounded.run(prompts, tokens).tokens
    result["stored16_equal_tokens"] = all(r.tokens == reference16 for r in our_runs["stored16_"])
    eight = our_runs["int8_"][0].tokens
    pairs = [(a, b) for x, y in zip(reference, eight, strict=True) for a, b in zip(x, y, strict=True)]
    result["int8_equal_tokens"] = round(sum(a == b for a, b in pairs) / len(pairs), 3)
    return result


def publish(folders: dict[str, Path], shape: dict[str, Any]) -> None:
    """Random weights, written by transformers itself in both types. Embeddings are small enough that the layers decide
    what comes next, and not the last token alone."""
    try:
        import transformers
    except ImportError:
        raise ServeConfigError(
            "bench peers: transformers is not installed; it comes with the extra dev"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.MambaConfig(**shape, initializer_range=0.02)
    model = transformers.MambaForCausalLM(config)
    model.save_pretrained(folders["float32"])
    model.bfloat16().save_pretrained(folders["bfloat16"])


def weight_bytes(model: torch.nn.Module) -> int:
    """What a step of few rows reads: of weights that have eight bits, those."""
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            total += parameter.nbytes
        for name, weight in (("blocked", "weight"), ("tied_head", "embeddings.weight")):
            held: Blocked | None = getattr(module, name, None)
            if held is not None:
                total += held.nbytes - module.get_parameter(weight).nbytes
    return total


def _median_gap(times: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def _show(rows: list[dict[str, Any]], threads: int, nbytes: dict[str, int]) -> None:
    ways = {"": "float32", "stored16_": "bfloat16 checkpoint", "int8_": "int8"}
    held = ", ".join(f"{name} {nbytes[way] / 1e6:.0f} MB" for way, name in ways.items())
    columns = [f"{name} ms (ratio, of the limit)" for name in ways.values()]

    def cells(r: dict[str, Any]) -> list[str]:
        return [
            f"{r[way + 'ms']:.1f} ({r[way + 'ratio']:.2f}, {r[way + 'share_of_limit']:.0%})" for way in ways
        ]

    report(
        f"Mamba-130M, {threads} threads; weights: {held}",
        ("batch", "transformers ms", *columns, "same tokens"),
        (
            (
                str(r["batch"]),
                f"{r['transformers_ms']:.1f}",
                *cells(r),
                "yes" if r["equal_tokens"] and r["stored16_equal_tokens"] else "NO",
            )
            for r in rows
        ),
        {"bench": "peers", "rows": rows},
    )
