"""A gateway's side of the streams to the engine replicas."""

import asyncio
import collections
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
from tokenizers import Tokenizer

from protos.fathom.internal.v1 import engine_pb2 as wire
from protos.fathom.internal.v1 import engine_pb2_grpc
from serving.cluster.convert import error_from, output_from, submit_from
from serving.cluster.death import death
from serving.cluster.link import SIGN_OF_LIFE_S, STREAM_OPTIONS, TOKEN_KEY, Entry
from serving.engine.core import Request
from serving.engine.description import Description
from serving.engine.news import Output
from serving.errors import UnavailableError
from serving.gateway.chat import ChatTemplate

log = logging.getLogger("fathom.gateway")

SILENCE_S = 6 * SIGN_OF_LIFE_S
"""A stream that has said nothing for so long is given up: its replica, or the node under it, is gone."""


MESSAGE_BYTES = 4 << 20
"""Of requests, after which what else is to be sent goes with the next message."""

TOKEN_BYTES = 3
"""Of a token in a message, about."""


class Mailbox:
    """News of one request, as it comes from its replica."""

    def __init__(self, some: asyncio.Event):
        """`some` is set whenever there is some."""
        self._outputs: dict[int, Output] = {}  # by continuation
        self._error: Exception | None = None
        self._some = some

    def put(self, out: Output) -> None:
        known = self._outputs.get(out.index)
        if known is None:
            self._outputs[out.index] = out
        else:
            known.extend(out)
        self._some.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._some.set()

    def take(self) -> tuple[list[Output], Exception | None]:
        """All news since the last call, one for each continuation that has some; and what ended the request, which
        came after them."""
        outputs, self._outputs = self._outputs, {}
        return list(outputs.values()), self._error


class ReplicaLostError(UnavailableError):
    """The replica ended, or fell silent, with the request unfinished."""


class Replica:
    """One engine replica: its description, its load, and the requests that this gateway has there."""

    def __init__(self, entry: Entry, on_change: Callable[["Replica"], None]):
        self.entry = entry
        self.description: Description | None = None  # None until it has introduced itself
        self.tokenizer: Tokenizer | None = None
        self.chat: ChatTemplate | None = None
        self.load = wire.Load()
        self.alive = True
        self._sent = 0  # requests since the last report of its load
        self._refused = False  # somebody, since then
        self._on_change = on_change
        self._mailboxes: dict[str, Mailbox] = {}
        self._outbox = Outbox()
        self._channel = grpc.aio.insecure_channel(entry.address, STREAM_OPTIONS)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)
        self._task = asyncio.create_task(self._run())

    @property
    def ready(self) -> bool:
        return self.alive and self.description is not None and not self.load.draining

    @property
    def pressure(self) -> float:
        """How busy it is: below 1 while it has free slots. Counts what this gateway has sent since the last report."""
        busy = max(self.load.running + self.load.waiting, len(self._mailboxes))
        return busy / max(1, self.load.slots)

    @property
    def room(self) -> int:
        """Requests that would find a slot or a place in its queue, counting what this gateway has sent since the last
        report."""
        free = max(0, self.load.slots - self.load.running)
        return self.load.queue + free - self.load.waiting - self._sent

    def yields(self, owner: str, running: int) -> bool:
        """Whether somebody else has so many places in its queue that `owner`, who has `running` requests, may come to
        have one of them. The replica sees to that: others may come through other gateways."""
        return self.load.crowd != owner and self.load.crowd_waiting >= running + 2

    def refuse(self) -> None:
        """Somebody is turned away for want of room here."""
        if not self._refused:  # one for all until the next report
            self._refused = True
            self._outbox.refused()

    def submit(self, request: Request, timeout_s: float | None, some: asyncio.Event) -> Mailbox:
        """Send a request; `some` is set when there is news of it. Raises UnavailableError when the replica is
        gone."""
        if not self.alive:
            raise ReplicaLostError("the replica is gone")
        mailbox = self._mailboxes[request.id] = Mailbox(some)
        self._sent += 1
        self._outbox.submit(submit_from(request, timeout_s))
        return mailbox

    def cancel(self, request_id: str, index: int | None = None) -> None:
        if self.alive:
            self._outbox.cancel(wire.Cancel(request_id=request_id, index=index))

    def forget(self, request_id: str) -> None:
        """No more news of this request is wanted."""
        self._mailboxes.pop(request_id, None)

    async def metrics(self) -> str:
        """The replica's metrics, in Prometheus' text format."""
        answer = await self._stub.Metrics(wire.MetricsRequest(), metadata=self._credentials(), timeout=2)
        return str(answer.text)

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def _credentials(self) -> tuple[tuple[str, str], ...]:
        return ((TOKEN_KEY, self.entry.token),)

    async def _run(self) -> None:
        reason = "its stream ended"
        dying = asyncio.ensure_future(death(self.entry.process))
        try:
            stream = aiter(self._stub.Attach(self._outbox.messages(), metadata=self._credentials()))
            while True:
                reading = asyncio.ensure_future(anext(stream))
                try:
                    await _within({reading, dying}, SILENCE_S)
                    if not reading.done():
                        reason = "its process is ending"
                        break
                    self._take(reading.result())
                finally:
                    reading.cancel()
        except StopAsyncIteration:
            pass
        except TimeoutError:
            reason = f"it was silent for {SILENCE_S:g} s"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except Exception as error:
            log.exception("reading from replica %s", self.entry.replica)
            reason = str(error)
        finally:
            dying.cancel()
            self.alive = False
            if self.description is not None:
                gone = "replica %s of %s is gone with %d requests: %s"
                log.warning(gone, self.entry.replica, self.entry.model, len(self._mailboxes), reason)
            for mailbox in self._mailboxes.values():
                mailbox.fail(ReplicaLostError(f"the replica is gone: {reason}"))
            self._mailboxes.clear()
            self._on_change(self)
            await self._channel.close()

    def _take(self, events: wire.Events) -> None:
        drained = events.load.draining and not self.load.draining
        self.load, self._sent, self._refused = events.load, 0, False
        if drained:
            self._on_change(self)
        if events.description:
            self.description = Description.from_json(events.description)
            self.tokenizer = Tokenizer.from_str(events.tokenizer.decode()) if events.tokenizer else None
            self.chat = ChatTemplate(**json.loads(events.chat)) if events.chat else None
            self._on_change(self)
        for tokens in events.tokens:
            mailbox = self._mailboxes.get(tokens.request_id)
            if mailbox is not None:
                mailbox.put(output_from(tokens))
        for failed in events.failures:
            mailbox = self._mailboxes.pop(failed.request_id, None)
            if mailbox is not None:
                mailbox.fail(error_from(failed))


class Outbox:
    """Commands to one replica that it has not been sent yet."""

    def __init__(self) -> None:
        self._submits: collections.deque[wire.Submit] = collections.deque()
        self._cancels: list[wire.Cancel] = []
        self._refused = False
        self._some = asyncio.Event()

    def submit(self, submit: wire.Submit) -> None:
        self._submits.append(submit)
        self._some.set()

    def cancel(self, cancel: wire.Cancel) -> None:
        self._cancels.append(cancel)
        self._some.set()

    def refused(self) -> None:
        self._refused = True
        self._some.set()

    async def messages(self) -> AsyncIterator[wire.Commands]:
        """All there is in a message, as soon as there is some; what is large, in several."""
        while True:
            await self._some.wait()
            commands = wire.Commands(refused=self._refused)
            size = 0
            while self._submits and size < MESSAGE_BYTES:
                submit = self._submits.popleft()
                size += len(submit.state) + TOKEN_BYTES * (len(submit.prompt) + len(submit.resumed))
                commands.submits.append(submit)
            if not self._submits:  # else some of what is cancelled may be among them
                commands.cancels.extend(self._cancels)
                self._cancels.clear()
                self._some.clear()
            self._refused = False
            yield commands


async def _within(tasks: set[asyncio.Future[Any]], seconds: float) -> None:
    """Until one of the tasks is done. Raises TimeoutError when it takes longer, and not because this very event loop
    was held up: after that, the tasks have their chance first."""
    for _ in range(2):
        done, _ = await asyncio.wait(tasks, timeout=seconds / 2, return_when=asyncio.FIRST_COMPLETED)
        if done:
            return
    raise TimeoutError
