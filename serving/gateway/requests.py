"""The life of a request, whatever door it came through: validated, sent to a replica, turned into text."""

import asyncio
import hashlib
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serving.config import GatewaySpec
from serving.engine.core import Request
from serving.engine.news import FinishReason, Output, Usage
from serving.engine.params import SamplingParams
from serving.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    OverloadedError,
    RequestError,
)
from serving.gateway.fleet import Fleet
from serving.gateway.journey import Journey
from serving.gateway.keys import Caller, Keys
from serving.sessions.sessions import Sessions, Turn
from serving.sessions.store import StateStore
from serving.text import TextStream

LONG_TEXT = 1 << 15  # characters; longer ones are encoded off the event loop
MAX_REQUEST_ID = 128
POOLINGS = ("mean", "last")


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client asks for, in no protocol's terms."""

    prompt: str | list[int]
    model: str = ""
    params: SamplingParams = field(default_factory=SamplingParams)
    timeout_s: float | None = None
    deadline: float | None = None  # on the monotonic clock: its client waits no longer
    request_id: str = ""
    priority: int = 0
    session_id: str = ""
    resumed: list[int] = field(default_factory=list)  # tokens of the continuation that the client has already
    add_special_tokens: bool = True  # those with which the tokenizer begins (and ends) a text
    traceparent: str = ""  # of the caller's span, as W3C Trace Context writes it
    credential: str = ""  # the API key


def unique(request_id: str) -> str:
    """An id for a request whose client gave it one that may be another's too; names the client's."""
    return f"{request_id}.{secrets.token_hex(6)}" if request_id else ""


@dataclass(slots=True)
class Piece:
    """A part of one continuation."""

    request_id: str
    index: int
    text: str
    news: Output  # ids, depths, log-probabilities, finish_reason; usage in the last piece of the request
    lengths: list[int] = field(default_factory=list)  # characters of the text that came with each token


@dataclass(slots=True)
class Record:
    """What became of a request, for logs and traces."""

    method: str  # generate, score, embed
    request_id: str
    model: str
    started: int = field(default_factory=time.time_ns)  # nanoseconds since 1970, like `sent`
    sent: int = 0  # to a replica
    traceparent: str = ""
    prompt_tokens: int = 0
    replica: str = ""
    usage: Usage | None = None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None


Listener = Callable[[Record], None]


class Requests:
    """Runs requests on a fleet of replicas."""

    def __init__(
        self,
        fleet: Fleet,
        spec: GatewaySpec,
        listeners: Sequence[Listener] = (),
        *,
        keys: Keys | None = None,
        sessions: Sessions | None = None,
    ):
        """`listeners` are told of every request when it has ended."""
        file = None if spec.keys_file is None else Path(spec.keys_file).expanduser()
        self.keys = keys or Keys(file)
        self.sessions = sessions or Sessions(
            StateStore(spec.state_store), ttl_s=spec.session_ttl_s, most=spec.max_sessions
        )
        self.fleet = fleet
        self._spec = spec
        self._listeners = tuple(listeners)
        self._open = 0
        self._open_of: Counter[str] = Counter()  # by caller

    async def generate(self, ask: Ask) -> AsyncGenerator[Piece]:
        """Pieces of the continuations as they come. Closing the iterator cancels the request.

        Raises RequestError; DeadlineExceededError after the pieces that were ready.
        """
        with self._recorded("generate", ask) as record:
            caller = await self._admitted(ask)
            async with self._turn(ask, caller) as turn:
                prepared, tokenizer, eos = await self._prepare(ask, record, caller.name, turn)
                with caller.stream(len(prepared.prompt) - len(turn.record.tokens if turn else ())):
                    texts = _texts(ask, tokenizer, eos)
                    given = 0  # tokens; the engine may have been a few ahead of a stop string
                    async with self._journey(prepared, ask, record) as journey:
                        async for out in journey.news():
                            usage, out.usage = out.usage, None
                            piece = _piece(texts[out.index], journey, out)
                            if piece is None and usage is None:
                                continue
                            piece = piece or Piece(prepared.id, out.index, "", Output(prepared.id, out.index))
                            given += len(piece.news.ids)
                            caller.spend(len(piece.news.ids))
                            if usage is not None:
                                piece.news.usage = replace(usage, completion_tokens=given)
                                try:
                                    if turn is not None:
                                        await _commit(turn, prepared, texts[0], journey)
                                except RequestError:  # what cannot be kept has been said all the same
                                    piece.news.usage = None
                                    yield piece
                                    raise
                            yield piece
                            if journey.finish_reason is FinishReason.DEADLINE and usage is not None:
                                raise self._over(ask)

    async def score(self, ask: Ask) -> tuple[list[int], Output]:
        """The prompt's token ids, and the log-probability of each after the first. Raises RequestError."""
        return await self._read("score", ask, score=True)

    async def embed(self, ask: Ask, pooling: str) -> tuple[list[int], Output]:
        """The prompt's token ids, and in the output one vector for all of it: the "mean" or the "last" of the
        hidden vectors that the head would see. Raises RequestError."""
        if pooling not in POOLINGS:
            raise InvalidArgumentError("pooling", pooling, f"must be one of {', '.join(POOLINGS)}")
        return await self._read("embed", ask, embed=pooling)

    async def _read(self, method: str, ask: Ask, **work: Any) -> tuple[list[int], Output]:
        """All that the engine says of a prompt that nothing is generated after."""
        with self._recorded(method, ask) as record:
            caller = await self._admitted(ask)
            prepared, _, _ = await self._prepare(ask, record, caller.name, **work)
            whole = Output(prepared.id, 0)
            with caller.stream(len(prepared.prompt)):
                async with self._journey(prepared, ask, record) as journey:
                    async for out in journey.news():
                        whole.extend(out)
            if whole.finish_reason is FinishReason.DEADLINE:
                raise self._over(ask)
        return prepared.prompt, whole

    def full(
        self, method: str, credential: str, request_id: str = "", traceparent: str = ""
    ) -> OverloadedError | None:
        """What anybody with this credential is told, whatever they ask: there is no room. A door that asks before it
        has read anything turns them away at a fraction of what reading costs. None where it depends on the request,
        which has all of this checked once more."""
        model = ""
        try:
            self._check_room()
            caller = self.keys.authenticate(credential)
            models = self.fleet.models
            if len(models) == 1 and caller.may_use(models[0]):
                model = models[0]
                self._check_queue(caller, model)
        except OverloadedError as error:
            for listener in self._listeners:
                listener(Record(method, request_id, model, traceparent=traceparent, error=error))
            return error
        except RequestError:
            return None
        return None

    @contextmanager
    def _recorded(self, method: str, ask: Ask) -> Iterator[Record]:
        """Tells the listeners what became of the request inside."""
        record = Record(method, ask.request_id, ask.model, traceparent=ask.traceparent)
        try:
            yield record
        except (Exception, asyncio.CancelledError, GeneratorExit) as error:
            record.error = error
            raise
        finally:
            for listener in self._listeners:
                listener(record)

    async def _admitted(self, ask: Ask) -> Caller:
        """Raises UnauthenticatedError, PermissionDeniedError, or OverloadedError, before anything has been done."""
        self._check_room()
        caller = self.keys.authenticate(ask.credential)
        model = self.fleet.resolve(ask.model)
        caller.check(model)
        caller.check_priority(ask.priority)
        self._check_queue(caller, model)
        await self.fleet.returned(model)
        return caller

    def _check_queue(self, caller: Caller, model: str) -> None:
        """Raises OverloadedError. Who has less than the others may take a place of theirs."""
        if self._open_of[caller.name] * len(self._open_of) >= self._open:
            self.fleet.check_room(model, caller.name, self._open_of[caller.name])

    def _check_room(self) -> None:
        """Raises OverloadedError."""
        if self._open >= self._spec.max_streams:
            raise OverloadedError(f"this gateway carries {self._open} streams, and no more")

    @asynccontextmanager
    async def _turn(self, ask: Ask, caller: Caller) -> AsyncIterator[Turn | None]:
        """The session that is asked to be continued. Raises NotFoundError, FailedPreconditionError, DataLossError."""
        if not ask.session_id:
            yield None
            return
        if ask.params.n != 1:
            raise InvalidArgumentError("n", ask.params.n, "must be 1 within a session: fork it")
        model = self.fleet.resolve(ask.model)
        fingerprint = self.fleet.describe(model)[0].identity
        lasts_s = self._timeout(ask)
        async with self.sessions.turn(caller.name, ask.session_id, model, fingerprint, lasts_s) as turn:
            yield turn

    async def _prepare(
        self, ask: Ask, record: Record, owner: str, turn: Turn | None = None, **work: Any
    ) -> tuple[Request, Tokenizer | None, tuple[int, ...]]:
        """Check everything that can be checked here, and turn text into ids. `work`: what is wanted of the
        prompt, if not continuations."""
        model = record.model = self.fleet.resolve(ask.model)
        self._timeout(ask)
        if len(ask.request_id) > MAX_REQUEST_ID:
            raise InvalidArgumentError("request_id", ask.request_id, f"at most {MAX_REQUEST_ID} characters")
        description, replicas = self.fleet.describe(model)
        tokenizer = replicas[0].tokenizer
        before = turn.record.tokens if turn is not None else []
        ids = before + await _encoded(ask, model, tokenizer, begins=not before)
        if not ids:
            raise InvalidArgumentError("prompt", ask.prompt, "must hold at least one token")
        _check_ids("prompt", ids[len(before) :], description.vocab_size)
        most = description.max_tokens - (not work)
        if len(ids) > most:
            raise InvalidArgumentError(
                "prompt", f"{len(ids)} tokens", f"at most {most} tokens fit this model"
            )
        ask.params.check_vocabulary(description.vocab_size)
        if ask.params.n > description.slots:
            raise InvalidArgumentError("n", ask.params.n, f"this model has {description.slots} slots")
        _check_resumed(ask, description.vocab_size)
        request = Request(
            id=ask.request_id or uuid.uuid4().hex,
            prompt=ids,
            params=ask.params,
            resumed=ask.resumed,
            state=turn.state if turn is not None else b"",
            keep=turn is not None,
            seed=_seed(ask),
            priority=ask.priority,
            owner=owner,
            **work,
        )
        record.request_id, record.prompt_tokens = request.id, len(ids)
        return request, tokenizer, description.eos_token_ids

    def _timeout(self, ask: Ask) -> float:
        """Seconds that the request may take."""
        if ask.timeout_s is None:
            return self._spec.default_timeout_s
        if not 0 < ask.timeout_s <= self._spec.max_timeout_s:  # NaN is not
            limit = f"must be above 0, at most {self._spec.max_timeout_s:g}"
            raise InvalidArgumentError("timeout_s", ask.timeout_s, limit)
        return ask.timeout_s

    def _deadline(self, ask: Ask) -> float:
        """When the request has to be done, on the monotonic clock: its timeout's end, or its client's own deadline."""
        own = time.monotonic() + self._timeout(ask)
        return own if ask.deadline is None else min(own, ask.deadline)

    def _over(self, ask: Ask) -> DeadlineExceededError:
        if ask.deadline is not None and ask.deadline <= time.monotonic():
            return DeadlineExceededError("the client's deadline is over")
        return DeadlineExceededError(f"timeout_s = {self._timeout(ask):g} is over")

    @asynccontextmanager
    async def _journey(self, request: Request, ask: Ask, record: Record) -> AsyncIterator[Journey]:
        """A request under way; nothing is left of it on any replica afterwards."""
        self._check_room()
        model = self.fleet.resolve(ask.model)
        journey = Journey(
            self.fleet,
            model,
            request,
            deadline=self._deadline(ask),
            resumes=self._spec.on_replica_loss == "resume",
            patience_s=self._spec.resume_timeout_s,
        )
        journey.start(self.fleet.pick(model))
        record.sent = time.time_ns()
        self._open += 1
        self._open_of[request.owner] += 1
        try:
            yield journey
        finally:
            self._open -= 1
            self._open_of[request.owner] -= 1
            self._open_of += Counter()  # without those who have none
            record.replica = journey.replica
            record.usage, record.finish_reason = journey.usage, journey.finish_reason
            journey.end()


async def _encoded(ask: Ask, model: str, tokenizer: Tokenizer | None, *, begins: bool) -> list[int]:
    """Token ids of the prompt; `begins`: nothing goes before it. Raises InvalidArgumentError or
    FailedPreconditionError."""
    if not isinstance(ask.prompt, str):
        return list(ask.prompt)
    if tokenizer is None:
        raise FailedPreconditionError(f"model {model!r} has no tokenizer: give token ids, not text")
    encode = partial(tokenizer.encode, ask.prompt, add_special_tokens=ask.add_special_tokens and begins)
    return list((await asyncio.to_thread(encode) if len(ask.prompt) > LONG_TEXT else encode()).ids)


def _piece(text: TextStream, journey: Journey, out: Output) -> Piece | None:
    """What a client is told of some news; nothing after a stop string."""
    already = text.stopped
    if already:
        return None
    parts, rest = text.feed(out.ids, last=out.finish_reason is not None)
    if len(parts) < len(out.ids):
        out.cut(0, len(parts))
    if text.stopped:
        if out.finish_reason is None:
            journey.cancel(out.index)
        out.finish_reason = FinishReason.STOP
    return Piece(out.request_id, out.index, "".join(parts) + rest, out, [len(part) for part in parts])


def _check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    """Raises InvalidArgumentError."""
    for wrong in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= wrong < vocab_size:
            limit = f"token ids of this model are 0 to {vocab_size - 1}"
            raise InvalidArgumentError(name, wrong, limit)


def _texts(ask: Ask, tokenizer: Tokenizer | None, eos: tuple[int, ...]) -> list[TextStream]:
    """A stream of text for each continuation. Raises InvalidArgumentError."""
    if ask.params.stop and tokenizer is None:
        limit = "this model has no tokenizer: use stop_token_ids"
        raise InvalidArgumentError("stop", ask.params.stop[0], limit)
    endings = frozenset((*(() if ask.params.ignore_eos else eos), *ask.params.stop_token_ids))
    texts = [TextStream(tokenizer, ask.params.stop, endings) for _ in range(ask.params.n)]
    texts[0].feed(ask.resumed, last=False)
    if texts[0].stopped:
        raise InvalidArgumentError("resumed_token_ids", ask.resumed[-1], "they hold a stop already")
    return texts


async def _commit(turn: Turn, request: Request, text: TextStream, journey: Journey) -> None:
    """Let the session hold the prompt and what its client was given after it; after a deadline it stays as it
    was."""
    if journey.finish_reason is FinishReason.DEADLINE:
        return
    given = journey.given(0)[: text.tokens]
    state = journey.state(0)
    usable = state is not None and state.tokens - 1 <= len(given)
    await turn.commit(request.prompt + given, state.data if state is not None and usable else None)


def _seed(ask: Ask) -> int:
    """The request's own; else that of its id, so that a retry says the same; else any."""
    if ask.params.seed is not None:
        return ask.params.seed
    if ask.request_id:
        return int.from_bytes(hashlib.blake2b(ask.request_id.encode(), digest_size=7).digest())
    return secrets.randbits(56)


def _check_resumed(ask: Ask, vocab_size: int) -> None:
    """Raises InvalidArgumentError."""
    if not ask.resumed:
        return
    if ask.params.n != 1:
        raise InvalidArgumentError(
            "resumed_token_ids", len(ask.resumed), "only one continuation is resumed: n = 1"
        )
    if len(ask.resumed) >= ask.params.max_tokens:
        limit = f"must be fewer than max_tokens = {ask.params.max_tokens}"
        raise InvalidArgumentError("resumed_token_ids", f"{len(ask.resumed)} tokens", limit)
    _check_ids("resumed_token_ids", ask.resumed, vocab_size)
