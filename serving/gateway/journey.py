"""One request on its way through the fleet: when its replica is lost or drained, it goes on on another."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from serving.engine.core import Request
from serving.engine.news import FinishReason, Output, StateAfter, Usage
from serving.engine.params import MAX_PRIORITY
from serving.engine.random import derive
from serving.errors import DeadlineExceededError, OverloadedError, UnavailableError
from serving.gateway.fleet import Fleet
from serving.gateway.replicas import Mailbox, Replica

log = logging.getLogger("fathom.gateway")

FIRST = MAX_PRIORITY + 1  # of what has waited once already

AGAIN_S = 0.02
"""Between two moves of one request."""

OVERDUE_S = 5.0
"""After its deadline, in which a request's replica should have said that it is over."""


@dataclass(slots=True)
class _Leg:
    """A request, or one continuation of it, on one replica."""

    replica: Replica
    request: Request  # as it was sent
    mailbox: Mailbox
    indices: list[int]  # the continuations, as the client counts them
    repeated: int = 0  # tokens that a prompt's reading says once more
    moved: list[int] = field(default_factory=list)  # continuations that have left it, and are on no other yet
    over: bool = False


@dataclass(slots=True)
class _Heard:
    """What one continuation has said."""

    ids: list[int] = field(default_factory=list)
    units: int = 0
    state: StateAfter | None = None
    cancelled: bool = False
    finish_reason: FinishReason | None = None

    @property
    def over(self) -> bool:
        return self.cancelled or self.finish_reason is not None


class Journey:
    """Sends a request to a replica, and what is left of it to others, until it is done."""

    def __init__(
        self, fleet: Fleet, model: str, request: Request, *, deadline: float, resumes: bool, patience_s: float
    ):
        """`deadline` on the monotonic clock; `patience_s`: how long it waits for another replica."""
        self.request = request
        self.usage: Usage | None = None  # once it is done
        self.finish_reason: FinishReason | None = None  # of the continuation that ended last
        self.moves = 0
        self.replica = ""  # name of the one that it is on, or was last
        self._fleet = fleet
        self._model = model
        self._deadline = deadline
        self._resumes = resumes
        self._patience_s = patience_s
        self._some = asyncio.Event()
        self._overdue = False
        self._heard = [_Heard(list(request.resumed)) for _ in range(request.params.n)]
        self._usages: list[Usage] = []
        self._legs: list[_Leg] = []

    def start(self, replica: Replica) -> None:
        """Raises UnavailableError when the replica is gone."""
        self._send(replica, self.request, list(range(self.request.params.n)))

    def given(self, index: int) -> list[int]:
        """The tokens of a continuation so far."""
        return self._heard[index].ids

    def state(self, index: int) -> StateAfter | None:
        """The newest snapshot of a continuation."""
        return self._heard[index].state

    async def news(self) -> AsyncGenerator[Output]:
        """All news as they come, each token once; the usage with the last. Raises RequestError."""
        # One timer for all that it waits for: one for each message would cost as much as the rest of this.
        timer = asyncio.get_running_loop().call_at(self._deadline + OVERDUE_S, self._give_up)
        try:
            while self._legs:
                await self._some.wait()
                self._some.clear()
                for leg in list(self._legs):
                    outputs, error = leg.mailbox.take()
                    for out in outputs:
                        if self._tell(leg, out):
                            yield out
                    if error is not None and not leg.over:
                        self._lost(leg, error)
                    if leg.over:
                        self._drop(leg)
                    if leg.moved:
                        await self._move(leg)
                if self._overdue and self._legs:
                    raise DeadlineExceededError("the time is over, and the replica says nothing")
        finally:
            timer.cancel()
        if self.usage is None:  # what was left on a lost replica had been cancelled
            self.usage = self._whole()
            yield Output(self.request.id, 0, usage=self.usage)

    def cancel(self, index: int) -> None:
        """Stop one continuation."""
        self._heard[index].cancelled = True
        for leg in self._legs:
            if index in leg.indices:
                leg.replica.cancel(leg.request.id, leg.indices.index(index))

    def end(self) -> None:
        """Leave nothing behind on any replica."""
        for leg in list(self._legs):
            leg.replica.cancel(leg.request.id)
            self._drop(leg)

    def _give_up(self) -> None:
        self._overdue = True
        self._some.set()

    def _tell(self, leg: _Leg, out: Output) -> bool:
        """Make of a replica's news what the client is to hear of them; whether that is anything."""
        out.request_id, out.index = self.request.id, leg.indices[out.index]
        heard = self._heard[out.index]
        if leg.repeated:
            again = min(leg.repeated, len(out.ids))
            out.cut(again)
            leg.repeated -= again
        heard.ids += out.ids
        heard.units += sum(out.depths)
        heard.state = out.state or heard.state
        if out.finish_reason is FinishReason.MOVED:
            leg.moved.append(out.index)
            out.finish_reason = None
        elif out.finish_reason is not None:
            self.finish_reason = heard.finish_reason = out.finish_reason
        if out.usage is not None:
            leg.over = True
            self._usages.append(out.usage)
            self.usage = self._whole() if all(h.over for h in self._heard) else None
        out.usage = self.usage
        return bool(out.ids or out.embedding or out.finish_reason or out.usage)

    def _lost(self, leg: _Leg, error: Exception) -> None:
        """A leg has failed. Raises the error, unless others may do what it has left over."""
        again = isinstance(error, UnavailableError) or (isinstance(error, OverloadedError) and self.moves)
        if not (again and self._resumes):
            raise error
        log.debug("request %s goes on elsewhere: %s", self.request.id, error)
        leg.over = True
        leg.moved = [index for index in leg.indices if not self._heard[index].over]

    async def _move(self, leg: _Leg) -> None:
        """Send what has left a leg to another replica."""
        if self.moves:
            await asyncio.sleep(AGAIN_S)
        self.moves += 1
        replica = await self._another()
        moved, leg.moved = leg.moved, []
        for index in moved:
            heard = self._heard[index]
            if leg.request.reads_only:
                self._send(replica, replace(leg.request, priority=FIRST), [0])
                self._legs[-1].repeated = len(heard.ids)
                return
            params = replace(leg.request.params, n=1)
            request = Request(
                id=self.request.id,
                prompt=self.request.prompt,
                params=params,
                resumed=list(heard.ids),
                state=self.request.state if heard.state is None else heard.state.data,
                keep=self.request.keep,
                seed=derive(self.request.seed, index),
                priority=FIRST,
                owner=self.request.owner,
            )
            self._send(replica, request, [index])

    async def _another(self) -> Replica:
        """A replica that takes requests, as soon as there is one. Raises UnavailableError when none comes in time."""
        until = min(self._deadline, time.monotonic() + self._patience_s)
        while True:
            try:
                return self._fleet.pick(self._model)
            except UnavailableError:
                left = until - time.monotonic()
                if self._deadline <= time.monotonic():
                    raise DeadlineExceededError("the time is over, and no replica is ready") from None
                if left <= 0:
                    raise
                try:
                    await asyncio.wait_for(self._fleet.changed(), left)
                except TimeoutError:
                    continue

    def _send(self, replica: Replica, request: Request, indices: list[int]) -> None:
        # What a client takes up again may not have been stopped yet where it was: each leg has a name of its own.
        request = replace(request, id=f"{self.request.id}/{secrets.token_hex(6)}")
        left = max(0.0, self._deadline - time.monotonic())
        mailbox = replica.submit(request, left, self._some)
        self.replica = replica.entry.replica
        self._legs.append(_Leg(replica, request, mailbox, indices))

    def _drop(self, leg: _Leg) -> None:
        leg.replica.forget(leg.request.id)
        self._legs.remove(leg)

    def _whole(self) -> Usage:
        """The usage of all legs together."""
        if self._usages and (self.request.reads_only or not self.moves):
            return self._usages[-1]
        tokens = sum(len(h.ids) for h in self._heard) - len(self.request.resumed)
        depth = sum(h.units for h in self._heard) / max(1, tokens)
        whole = Usage(len(self.request.prompt), tokens, depth, 0.0, 0.0, 0.0)
        if not self._usages:
            return whole
        return replace(
            whole,
            cached_tokens=min(
                self._usages[0].cached_tokens, len(self.request.prompt)
            ),  # else of the continuation
            cache_miss_reason=self._usages[0].cache_miss_reason,
            flops_saved=self._usages[-1].flops_saved,
            queue_s=sum(u.queue_s for u in self._usages),
            prefill_s=sum(u.prefill_s for u in self._usages),
            decode_s=sum(u.decode_s for u in self._usages),
        )
