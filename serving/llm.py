"""The offline interface: a model in this process, without Ray or gRPC."""

import itertools
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kernels.invariance import use_invariance
from models.load import LoadedModel, load
from serving.engine.build import make_engine
from serving.engine.core import Request
from serving.engine.depth import DepthPolicy
from serving.engine.news import FinishReason, Output, Usage
from serving.engine.params import SamplingParams
from serving.errors import FailedPreconditionError, InvalidArgumentError
from serving.text import TextStream
from serving.threads import use_threads

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt. `token_ids`, `depths` and, where asked for, `logprobs` run in parallel."""

    index: int
    text: str
    token_ids: list[int]
    depths: list[int]
    exit_reasons: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    usage: Usage | None = None
    siblings: tuple["Completion", ...] = ()  # continuations 1 to n - 1, on continuation 0

    @property
    def outputs(self) -> tuple["Completion", ...]:
        """All n continuations of the prompt, this one first."""
        return (replace(self, siblings=()), *self.siblings)


class LLM:
    """A model ready to generate and score.

    llm = LLM("zoo/gla")
    llm.generate(["def read("], SamplingParams(temperature=0, max_tokens=32))[0].text
    """

    def __init__(
        self,
        model: str | Path | LoadedModel,
        *,
        dtype: str | torch.dtype = "auto",
        weights: str = "auto",
        slots: int = 32,
        device: str = "auto",
        prefill_tokens: int = 256,
        max_tokens: int | None = None,
        kv_tokens: int | None = None,
        prefix_cache_mb: float = 128,
        threads: int | None = None,
        batch_invariant: bool = True,
        progress: bool | None = None,
    ):
        """`slots` sequences run at a time; more prompts wait their turn. `max_tokens` bounds prompt and
        continuation together, `kv_tokens` those of all sequences where attention keeps every token.
        `weights="int8"` rounds those of projections to eight bits: quicker on a CPU, and another model by a little.
        `prefix_cache_mb` is for states of prompts that may come again. `progress` draws a bar on long work;
        by default where standard error is a terminal. `batch_invariant` holds for the whole process: in float32 on
        a CPU, a prompt's numbers are the same to the bit in any batch, which costs a little time on long prompts.

        Raises models.errors.ModelError when the model cannot be loaded, InvalidArgumentError for impossible options.
        """
        if not isinstance(slots, int) or slots < 1:
            raise InvalidArgumentError("slots", slots, "must be a whole number from 1")
        if not isinstance(prefill_tokens, int) or prefill_tokens < 1:
            raise InvalidArgumentError("prefill_tokens", prefill_tokens, "must be a whole number from 1")
        use_threads(threads)
        use_invariance(batch_invariant)
        self.loaded = model if isinstance(model, LoadedModel) else load(model, dtype, device, weights)
        self.tokenizer = self.loaded.tokenizer
        self.engine = make_engine(
            self.loaded,
            slots,
            prefill_tokens=prefill_tokens,
            max_waiting=sys.maxsize,
            max_tokens=max_tokens,
            kv_tokens=kv_tokens,
            prefix_cache_mb=prefix_cache_mb,
        )
        self._progress = sys.stderr.isatty() if progress is None else progress
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continue each prompt: a string, or a list of token ids. One completion for each, in their order; with
        n > 1 its `outputs` holds them all.

        Raises InvalidArgumentError, naming the field, before anything is run.
        """
        requests = self._requests(_listed(prompts), params or SamplingParams(), score=False)
        streams: dict[tuple[str, int], _Builder] = {}
        for request in requests:
            for index in range(request.params.n):
                streams[request.id, index] = _Builder(self, request, index)
        for out in self._run(requests, "generating"):
            builder = streams[out.request_id, out.index]
            if builder.add(out):
                self.engine.cancel(out.request_id, out.index)
        completions = []
        for request in requests:
            made = [streams[request.id, index].completion() for index in range(request.params.n)]
            completions.append(replace(made[0], siblings=tuple(made[1:])))
        return completions

    def score(
        self, prompts: Prompt | Sequence[Prompt], depth: DepthPolicy | str | None = None
    ) -> list[list[float]]:
        """For each prompt (a string, or a list of token ids), the natural-log probability of every token after the
        first, given those before it; each as deep as the policy says."""
        requests = self._requests(_listed(prompts), SamplingParams(depth=depth), score=True)
        scores: dict[str, list[float]] = {request.id: [] for request in requests}
        for out in self._run(requests, "scoring"):
            scores[out.request_id] += out.logprobs
        return [scores[request.id] for request in requests]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises FailedPreconditionError for text where the model has no tokenizer."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise FailedPreconditionError(
                f"{self.loaded.name} has no tokenizer.json: give token ids, not text"
            )
        return self.tokenizer.encode(prompt).ids

    def _requests(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams], score: bool
    ) -> list[Request]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidArgumentError(
                "params", len(each), f"must be one, or one for each of {len(prompts)} prompts"
            )
        requests = []
        for prompt, chosen in zip(prompts, each, strict=True):
            seed = secrets.randbits(63) if chosen.seed is None else chosen.seed
            requests.append(
                Request(str(next(self._ids)), self.encode(prompt), chosen, score=score, seed=seed)
            )
        submitted = []
        try:
            for request in requests:
                self.engine.submit(request)
                submitted.append(request)
        except Exception:
            for request in submitted:
                self.engine.cancel(request.id)
            raise
        return requests

    def _run(self, requests: list[Request], what: str) -> Iterator[Output]:
        left = {request.id for request in requests}
        with self._bar(what, len(requests)) as advance:
            try:
                while left:
                    for out in self.engine.step():
                        yield out
                        if out.usage is not None:
                            left.discard(out.request_id)
                            advance()
                    left &= self.engine.scheduler.requests.keys()
            finally:  # an interrupted caller leaves nothing behind
                for request_id in left:
                    self.engine.cancel(request_id)

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, disable=not self._progress or total < 2, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)


class _Builder:
    """Gathers one continuation from the engine's outputs."""

    def __init__(self, llm: LLM, request: Request, index: int):
        endings = () if request.params.ignore_eos else llm.loaded.eos_token_ids
        self._text = TextStream(
            llm.tokenizer, request.params.stop, frozenset((*endings, *request.params.stop_token_ids))
        )
        self._parts: list[str] = []
        self._all = Output(request.id, index)
        self._wants_logprobs = request.params.logprobs is not None

    def add(self, out: Output) -> bool:
        """Whether the continuation has just met a stop string, and the engine need not go on with it."""
        already = self._text.stopped
        if already:
            return False
        parts, rest = self._text.feed(out.ids, last=out.finish_reason is not None)
        self._parts += [*parts, rest]
        count = len(parts)
        self._all.ids += out.ids[:count]
        self._all.depths += out.depths[:count]
        self._all.exit_reasons += out.exit_reasons[:count]
        self._all.logprobs += out.logprobs[:count]
        self._all.top_logprobs += out.top_logprobs[:count]
        self._all.finish_reason = FinishReason.STOP if self._text.stopped else out.finish_reason
        self._all.usage = out.usage
        return self._text.stopped and out.finish_reason is None

    def completion(self) -> Completion:
        a = self._all
        return Completion(
            a.index,
            "".join(self._parts),
            a.ids,
            a.depths,
            a.exit_reasons,
            str(a.finish_reason or FinishReason.CANCELLED),
            a.logprobs if self._wants_logprobs else None,
            a.top_logprobs if self._wants_logprobs else None,
            a.usage,
        )


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt may stand without its list."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
