"""Sessions of requests: lengths, prompts and depth policies, drawn from one seed in the order in which they
are taken."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from uuid import uuid4

import numpy as np

from loadtest import depth, traces
from loadtest.config import Run
from loadtest.core import Depth, Model, Request, Sample, Sampling
from loadtest.errors import FlagError
from loadtest.prompts import TextPrompts, TokenPrompts, read_prompts
from loadtest.traces import Row, Scale

DEFAULT_MAX_TOKENS = 64
_SEED_STRIDE = 1_000_003  # keeps the sampling seeds of runs with neighbouring seeds apart


@dataclass(slots=True)
class Session:
    """What one user asks, turn by turn."""

    turns: list[Request]
    resend: bool  # every later prompt begins with all that came before
    think_time: float = 0.0  # seconds
    _taken: int = 0
    _text: str = ""
    _tokens: tuple[int, ...] = ()

    @property
    def turn(self) -> int:
        """Of the request that was taken last, from 0."""
        return self._taken - 1

    @property
    def more(self) -> bool:
        return self._taken < len(self.turns)

    @property
    def keep(self) -> bool:
        """Whether the next turn needs the text of this one."""
        return self.resend and self.more

    def next(self, last: Sample | None = None) -> Request:
        """The next turn, after what the last one gave."""
        request = self.turns[self._taken]
        self._taken += 1
        if not self.resend or len(self.turns) == 1:
            return request
        if request.tokens is None:
            self._text += (last.text if last else "") + request.text
            return replace(request, text=self._text)
        self._tokens += (*(last.tokens if last else ()), *request.tokens)
        return replace(request, tokens=list(self._tokens))


class Workload:
    """Raises FlagError where the model cannot take what is asked."""

    def __init__(self, run: Run, model: Model):
        self.run = run
        work = run.work
        self._rng = np.random.default_rng([run.load.seed, 1])
        self._mixture = depth.parse(work.depth, work.min_depth, work.max_depth)
        depth.check(self._mixture, model)
        self.rows = traces.read_trace(work.trace) if work.trace else []
        # Turns of a session share the model's length, as each resends what came before.
        limit = model.max_tokens // work.turns
        self.scale = self._scale(limit)
        self._texts = TextPrompts(self._given_texts(), self._rng)
        self._tokens = self._token_prompts(model)
        self._lengths = self._draw_lengths(limit)
        self._sampling = Sampling(work.temperature, work.top_p, work.top_k, work.ignore_eos)
        self._id = uuid4().hex[:8]
        self._drawn = 0

    @property
    def size(self) -> int | None:
        """Requests until the trace ends."""
        return len(self.rows) or None

    def sessions(self) -> Iterator[Session]:
        """Ends with the trace; else never."""
        work = self.run.work
        while turns := [self._request(row) for row in islice(self._lengths, work.turns)]:
            policy = self._policy()
            name = f"lt-{self._id}-s{self._drawn}" if work.history == "session" and work.turns > 1 else ""
            turns = [replace(turn, depth=policy, session_id=name) for turn in turns]
            yield Session(turns, work.history == "resend", work.think_time)

    def _request(self, row: Row) -> Request:
        tokens, text = None, ""
        if self._tokens is None:
            text = self._texts.of_length(row.input) if row.input else self._texts.next()
        elif row.blocks:
            tokens = self._tokens.of_blocks(row.input, row.blocks, self.scale.block)
        else:
            tokens = self._tokens.of_length(row.input)
        number = self._drawn
        self._drawn += 1
        return Request(
            text=text,
            tokens=tokens,
            max_tokens=row.output,
            sampling=self._sampling,
            seed=self.run.load.seed * _SEED_STRIDE + number,
            request_id=f"lt-{self._id}-{number}",
            priority=self.run.work.priority,
        )

    def _policy(self) -> Depth | None:
        if self._mixture is None:
            return None
        return self._mixture.depths[self._rng.choice(len(self._mixture.depths), p=self._mixture.shares)]

    def _given_texts(self) -> tuple[str, ...]:
        work = self.run.work
        return read_prompts(work.prompt_file) if work.prompt_file else work.prompt

    def _token_prompts(self, model: Model) -> TokenPrompts | None:
        """Token ids where a length is asked for and the vocabulary is known; text otherwise."""
        work = self.run.work
        given = bool(work.prompt or work.prompt_file)
        if given and not model.has_tokenizer:
            name = "--prompt" if work.prompt else "--prompt-file"
            raise FlagError(name, None, f"{model.name} has no tokenizer: use --input-tokens")
        sized = bool(work.input_tokens or work.trace or work.synthetic) or not model.has_tokenizer
        vocab_size = work.vocab_size or model.vocab_size
        if given or not sized or not vocab_size or self.run.server.transport.startswith("oip"):
            return None
        return TokenPrompts(vocab_size, model.eos_token_ids, work.shared_prefix, self._rng)

    def _scale(self, limit: int) -> Scale:
        work = self.run.work
        sample = self.rows
        if work.synthetic:
            sample = list(
                islice(traces.PUBLISHED[work.synthetic].draw(np.random.default_rng(self.run.load.seed)), 4096)
            )
        return Scale.of(work.length_scale, sample, limit if sample else 0, work.max_tokens)

    def _draw_lengths(self, limit: int) -> Iterator[Row]:
        work = self.run.work
        if self.rows:
            return map(self.scale.apply, self.rows)
        if work.synthetic:
            return map(self.scale.apply, traces.PUBLISHED[work.synthetic].draw(self._rng))
        length = work.input_tokens or (0 if self._tokens is None else 16)
        output = work.max_tokens or DEFAULT_MAX_TOKENS
        if limit and length + output > limit:
            each = f" in each of {work.turns} turns" if work.turns > 1 else ""
            asked = f"prompts of {length} and {output} more" if length else f"{output}"
            flag, value = ("--max-tokens", output) if output > length else ("--input-tokens", length)
            raise FlagError(flag, value, f"{asked} are over the {limit} tokens that the model takes{each}")
        return cycle([Row(0.0, length, output)])
