"""The engine: token ids in, token ids out. It knows neither Ray nor gRPC nor text."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from serving.engine.backend import Runner
from serving.engine.core import Chunk, Request, Sampled, Sequence, Tick
from serving.engine.depth import DepthPolicy
from serving.engine.grammar import Grammars
from serving.engine.memory import Memory
from serving.engine.news import FinishReason, Load, Output, Usage
from serving.engine.observer import Observer
from serving.engine.scheduler import Scheduler
from serving.engine.slots import TokenBudget
from serving.errors import InvalidArgumentError, UnavailableError


class Engine:
    """Continuous batching over the slots of one model. Not thread-safe: one thread submits, cancels and steps."""

    def __init__(
        self,
        runner: Runner,
        slots: int,
        *,
        eos_token_ids: Seq[int] = (),
        prefill_tokens: int = 256,
        max_waiting: int = 256,
        queue_target_s: float | None = None,
        max_tokens: int = 1 << 20,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
        grammars: Grammars | None = None,
        shed_wait_s: float | None = None,
        min_depth: int | None = None,
        prefix_cache_bytes: int = 0,
        snapshot_tokens: int = 0,
    ):
        """`max_tokens` bounds prompt and continuation together. Without `grammars` no request may have
        one. `max_waiting` and `queue_target_s` are the waiting queue's, `shed_wait_s` and `min_depth` the
        governor's, `prefix_cache_bytes` and `snapshot_tokens` the memory's."""
        self.runner = runner
        self.max_tokens = max_tokens
        self.eos_token_ids = tuple(eos_token_ids)
        self.observer = observer or Observer()
        self.grammars = grammars or Grammars(None, runner.vocab_size)
        self.clock = clock
        self.memory = Memory(runner, prefix_cache_bytes, snapshot_tokens)
        self.draining = False
        self.scheduler = Scheduler(
            runner.first_stage,
            runner.final_stages,
            slots,
            max_tokens=max_tokens,
            budget=TokenBudget(runner.token_capacity),
            prefill_tokens=prefill_tokens,
            max_waiting=max_waiting,
            queue_target_s=queue_target_s,
            clock=clock,
            shed_wait_s=shed_wait_s,
            min_depth=min_depth,
            fills=runner.fills,
            one_by_one=runner.one_by_one,
        )

    def step(self) -> list[Output]:
        """Run one stage once. Returns what is new."""
        outputs = self._expire()
        tick = self._schedule()
        if tick is None:
            return outputs
        started = self.clock()
        result = self.runner.run(tick, self.scheduler.rows, self.scheduler.paths)
        skipped = self.scheduler.exits.decide(tick, result.signals, self.scheduler.tick)
        if skipped:
            self.runner.skip(tick, skipped, self.scheduler.rows)
        outputs += self._emit(tick, result.sampled)
        self._ran(tick, self.clock() - started)
        return outputs

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.requests)

    def load(self) -> Load:
        return self.scheduler.load()

    def submit(self, request: Request) -> Request | None:
        """Queue a request; returns one that waited and had to make room for it. Raises InvalidArgumentError, naming the
        field, or OverloadedError."""
        if not request.prompt:
            raise InvalidArgumentError("prompt", "", "must hold at least one token")
        limit = self.max_tokens - (not request.reads_only)
        if len(request.given) > limit:
            given = f"{len(request.given)} tokens"
            raise InvalidArgumentError("prompt", given, f"at most {limit} tokens fit this model")
        low, high = min(request.prompt), max(request.prompt)
        if low < 0 or high >= self.runner.vocab_size:
            wrong = low if low < 0 else high
            raise InvalidArgumentError(
                "prompt", wrong, f"token ids of this model are 0 to {self.runner.vocab_size - 1}"
            )
        request.params.check_vocabulary(self.runner.vocab_size)
        self.prepare(request)
        asked = request.params.policy
        request.policy = self.runner.default_depth if asked is None else asked.over(self.runner.default_depth)
        if self.draining:
            raise UnavailableError("this replica is about to end")
        return self.scheduler.submit(request, self.runner.path(request.policy))

    def prepare(self, request: Request) -> None:
        """What of `submit` takes long, and may be done before it by any thread: compile the request's grammar,
        read its snapshot.

        Raises InvalidArgumentError, FailedPreconditionError or DataLossError."""
        if request.state and request.restored is None:
            request.restored = self.memory.read(request)
        if request.params.grammar is not None and request.matcher is None:
            request.matcher = self.grammars.matcher(request.params.grammar, self.eos_token_ids)

    def cancel(self, request_id: str, index: int | None = None) -> list[Output]:
        """Stop a request, or one of its continuations, and free its slots at once. Unknown ids are ignored: the
        request may just have ended."""
        request = self.scheduler.requests.get(request_id)
        return [] if request is None else self._stop(request, FinishReason.CANCELLED, index)

    def give_up(self) -> list[Request]:
        """Requests that have waited long while others were refused, and would wait on; they are not there any more."""
        return self.scheduler.give_up()

    def drain(self) -> list[Output]:
        """Take no more requests, and hand over those that there are: what waits or reads its prompt at once, the
        others after their next token, with their state."""
        self.draining = True
        outputs = []
        for request in list(self.scheduler.requests.values()):
            if request.reads_only or self.scheduler.before_decoding(request):
                outputs += self._stop(request, FinishReason.MOVED)
        return outputs

    def _schedule(self) -> Tick | None:
        for sequence in self.scheduler.admit():
            self.runner.admit(sequence, self._endings(sequence.request))
            sequence.tokens = list(sequence.request.resumed)
            if sequence.index == 0:
                self.memory.recall(sequence)
        return self.scheduler.schedule()

    def _ran(self, tick: Tick, seconds: float) -> None:
        self.scheduler.ran(tick, seconds)
        self.observer.ticked(tick, seconds)

    def _expire(self) -> list[Output]:
        return [
            out for request in self.scheduler.expired() for out in self._stop(request, FinishReason.DEADLINE)
        ]

    def _stop(self, request: Request, reason: FinishReason, index: int | None = None) -> list[Output]:
        if not request.sequences:
            self.scheduler.withdraw(request)
            usage = self._usage(request)
            self.observer.finished(request, reason, usage)
            return [Output(request.id, 0, finish_reason=reason, usage=usage)]
        outputs = []
        for sequence in request.sequences:
            if sequence.finished is None and index in (None, sequence.index):
                if index is not None:
                    self.scheduler.pass_on(sequence)
                outputs.append(out := Output(request.id, sequence.index))
                self._finish(sequence, reason, out)
        return outputs

    def _endings(self, request: Request) -> tuple[int, ...]:
        own = () if request.params.ignore_eos else self.eos_token_ids
        return (*own, *request.params.stop_token_ids)

    def _emit(self, tick: Tick, sampled: Sampled | None) -> list[Output]:
        """Hand out the tokens of a final stage, and send each on its way again."""
        if sampled is None:
            return []
        outputs = []
        rows, now = self.scheduler.rows, self.clock()
        for chunk in tick.chunks:
            outputs += self._prefilled(chunk, sampled)
        slots = sampled.slots
        gaps = rows.gaps(slots, now)
        self.observer.emitted(rows.units[slots], rows.reason[slots], gaps[~np.isnan(gaps)])
        sequences = [self.scheduler.running[slot] for slot in slots.tolist()]
        news = sampled.ids.tolist(), rows.units[slots].tolist(), rows.reason[slots].tolist()
        for row, (sequence, token, depth, reason) in enumerate(zip(sequences, *news, strict=True)):
            out = Output(sequence.request.id, sequence.index, [token], [depth], [reason])
            self._token(sequence, out, row, sampled, now)
            if sequence.request.policy.kind == "deadline" and not np.isnan(gaps[row]):
                self.scheduler.exits.pace(sequence, float(gaps[row]))
            outputs.append(out)
        self.scheduler.feed(sequence for sequence in sequences if sequence.finished is None)
        return outputs

    def _prefilled(self, chunk: Chunk, sampled: Sampled) -> list[Output]:
        """A chunk has passed the final stage."""
        sequence, rows = chunk.sequence, self.scheduler.rows
        self.scheduler.through(chunk)
        self.memory.passed(sequence)
        if sequence.request.score:
            return [self._scored(chunk, sampled)]
        if sequence.request.embed:
            return self._embedded(chunk, sampled)
        if chunk.last:
            for other in sequence.request.sequences:
                if other.finished is not None:
                    continue
                if other is not sequence:
                    self.runner.fork(sequence, other)
                rows.units[other.slot], rows.reason[other.slot] = chunk.units[-1], chunk.reasons[-1]
        return []

    def _token(self, sequence: Sequence, out: Output, row: int, sampled: Sampled, now: float) -> None:
        """One new token of one sequence, and what comes with it."""
        request, (token,) = sequence.request, out.ids
        sequence.tokens.append(token)
        sequence.counted += 1
        sequence.units += out.depths[0]
        if sampled.logprobs is not None and request.params.logprobs is not None:
            out.logprobs.append(float(sampled.logprobs[row]))
            out.top_logprobs.append(_alternatives(sampled, row, request.params.logprobs))
        if request.first_token is None:
            request.first_token = now
        if token in self._endings(request) and len(sequence.tokens) >= request.params.min_tokens:
            self._finish(sequence, FinishReason.STOP, out)
        elif len(sequence.tokens) >= request.params.max_tokens or sequence.length >= self.max_tokens:
            self._finish(sequence, FinishReason.LENGTH, out)
        else:
            out.state = self.memory.due(sequence, always=self.draining)
            if self.draining:
                self._finish(sequence, FinishReason.MOVED, out)

    def _scored(self, chunk: Chunk, sampled: Sampled) -> Output:
        """Log-probabilities of a chunk of a prompt that is only scored."""
        request = chunk.sequence.request
        scores = sampled.scores[chunk.sequence.slot]
        count = len(scores)
        ids = request.prompt[chunk.start + 1 : chunk.start + 1 + count]
        chunk.sequence.units += int(chunk.units[:count].sum())
        chunk.sequence.counted += count
        depths, reasons = chunk.units[:count].tolist(), chunk.reasons[:count].tolist()
        out = Output(request.id, 0, ids, depths, reasons, scores.tolist())
        if chunk.sequence.slot in sampled.score_tops:
            tops = (
                zip(i.tolist(), p.tolist(), strict=True)
                for i, p in zip(*sampled.score_tops[chunk.sequence.slot], strict=True)
            )
            out.top_logprobs = [dict(top) for top in tops]
        if chunk.last:
            self._finish(chunk.sequence, FinishReason.STOP, out)
        return out

    def _embedded(self, chunk: Chunk, sampled: Sampled) -> list[Output]:
        """What a chunk adds to the embedding of its prompt; the whole with the last one."""
        sequence = chunk.sequence
        sequence.embedding = sequence.embedding + sampled.embeddings[sequence.slot]
        sequence.units += int(chunk.units.sum())
        sequence.counted += len(chunk.ids)
        if not chunk.last:
            return []
        count = len(sequence.request.prompt) if sequence.request.embed == "mean" else 1
        out = Output(sequence.request.id, 0, embedding=(sequence.embedding / count).tolist())
        self._finish(sequence, FinishReason.STOP, out)
        return [out]

    def _finish(self, sequence: Sequence, reason: FinishReason, out: Output) -> None:
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            out.state = self.memory.ended(sequence)
        sequence.finished = out.finish_reason = reason  # from here on nobody else will free its slot
        self.runner.release(sequence)
        last = self.scheduler.finish(sequence)
        if last:
            out.usage = self._usage(sequence.request)
            self.observer.finished(sequence.request, reason, out.usage)

    def _usage(self, request: Request) -> Usage:
        now = self.clock()
        admitted = now if request.admitted is None else request.admitted
        first = now if request.first_token is None else request.first_token
        tokens = sum(s.counted for s in request.sequences)
        mean_depth = sum(s.units for s in request.sequences) / tokens if tokens else 0.0
        return Usage(
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached,
            cache_miss_reason=request.miss,
            completion_tokens=0 if request.reads_only else tokens,
            mean_depth=mean_depth,
            flops_saved=self._saved(request, mean_depth) if tokens else 0.0,
            queue_s=admitted - request.arrival,
            prefill_s=max(0.0, first - admitted),
            decode_s=now - first,
        )

    def _saved(self, request: Request, mean_depth: float) -> float:
        """Share of the operations of the full depth that the request's tokens did without. Where they write what they
        skip, that is counted; tokens of a prompt pass along among the others for it, at the full cost."""
        full = self.runner.flops(self.runner.path(DepthPolicy.full()))
        path, policy = self.runner.path(request.policy), request.policy
        most = path.full_depth if policy.max_depth is None else policy.max_depth
        reach = policy.depth or path.deepest(most, policy.min_depth or 0)
        if request.reads_only and self.runner.fills:
            mean_depth = reach
        return max(0.0, 1 - self.runner.flops(path, mean_depth, reach) / full)


def _alternatives(sampled: Sampled, row: int, count: int) -> dict[int, float]:
    if sampled.top_ids is None or sampled.top_logprobs is None:
        return {}
    pairs = zip(sampled.top_ids[row, :count], sampled.top_logprobs[row, :count], strict=True)
    return {int(token): float(logprob) for token, logprob in pairs}
