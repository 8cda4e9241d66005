"""All replicas of all models, and the choice among them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from serving.cluster.link import Entry
from serving.engine.description import Description
from serving.errors import InvalidArgumentError, NotFoundError, OverloadedError, UnavailableError
from serving.gateway.replicas import Replica

log = logging.getLogger("fathom.gateway")

Watch = Callable[[int, float], Awaitable[tuple[int, list[Entry]]]]
WATCH_S = 10.0
RECONNECT_S = 0.25

RETURN_S = 2.0
"""In which a replica that the directory lists, and that is out of touch, should be back."""


class Fleet:
    """The replicas that the directory lists, each with an open stream."""

    def __init__(self, expected: Sequence[str]):
        """`expected`: the models that are served as soon as they are loaded."""
        self._expected = tuple(expected)
        self._replicas: dict[str, Replica] = {}
        self._entries: dict[str, Entry] = {}  # as the directory listed them last
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def watch(self, watch: Watch) -> None:
        """Follow a directory from now on."""
        self._task = asyncio.create_task(self._follow(watch))

    async def close(self) -> None:
        self._entries = {}
        if self._task is not None:
            self._task.cancel()
        for replica in list(self._replicas.values()):
            await replica.close()

    @property
    def models(self) -> list[str]:
        """Names of all models that are or will be served."""
        return sorted({*self._expected, *(r.entry.model for r in self._replicas.values() if r.alive)})

    def replicas(self, model: str | None = None) -> list[Replica]:
        """Those that take requests."""
        return [r for r in self._replicas.values() if r.ready and model in (None, r.entry.model)]

    def resolve(self, model: str) -> str:
        """The name of the model that is meant: an empty one means the only one that is served.

        Raises InvalidArgumentError or NotFoundError."""
        known = self.models
        if not model and len(known) == 1:
            return known[0]
        if not model:
            raise InvalidArgumentError("model", model, f"must be one of {', '.join(known)}")
        if model not in known:
            raise NotFoundError(f"model = {model!r}: must be one of {', '.join(known)}")
        return model

    def pick(self, model: str) -> Replica:
        """The least busy replica. Raises UnavailableError while there is none."""
        ready = self.replicas(model)
        if not ready:
            raise UnavailableError(f"model {model!r} is not ready: it is loading, or its replicas are gone")
        return min(ready, key=lambda replica: replica.pressure)

    def check_room(self, model: str, owner: str = "", running: int = 0) -> None:
        """Raises OverloadedError where no replica has a place left, nor one that `owner`, who has so many requests
        here, might take from another: a refusal here costs little, and there what a request does."""
        ready = self.replicas(model)
        if ready and not any(replica.room > 0 or replica.yields(owner, running) for replica in ready):
            for replica in ready:
                replica.refuse()
            waiting = sum(replica.load.waiting for replica in ready)
            raise OverloadedError(f"the queue is full: {waiting} requests are waiting")

    def describe(self, model: str) -> tuple[Description, list[Replica]]:
        """Raises UnavailableError while no replica is ready."""
        self.pick(model)
        ready = self.replicas(model)
        description = ready[0].description
        assert description is not None  # it is ready
        return description, ready

    async def returned(self, model: str) -> None:
        """Until a replica takes requests, RETURN_S at most; at once where the directory lists none. One that was only
        slow to answer is connected again in a moment: whoever comes in between need not hear of it."""
        until = time.monotonic() + RETURN_S
        while not self.replicas(model) and any(e.model == model for e in self._entries.values()):
            try:
                await asyncio.wait_for(self.changed(), until - time.monotonic())
            except TimeoutError:
                return

    def changed(self) -> Awaitable[object]:
        """Until a replica comes, introduces itself, or goes: from this call on, not from when somebody waits for it."""
        return self._changed.wait()

    def _bump(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _follow(self, watch: Watch) -> None:
        version = -1
        while True:
            try:
                version, entries = await watch(version, WATCH_S)
                self.update(entries)
            except Exception as error:
                log.warning("the directory does not answer, trying again: %s", error)
                await asyncio.sleep(0.5)

    def update(self, entries: Sequence[Entry]) -> None:
        """Open streams to replicas that are new. One that has left the directory stays until its stream ends."""
        self._entries = {entry.replica: entry for entry in entries}
        for name in [name for name, r in self._replicas.items() if not r.alive]:
            del self._replicas[name]
        for entry in entries:
            known = self._replicas.get(entry.replica)
            if known is None or known.entry != entry:
                self._connect(entry)
        self._bump()

    def _connect(self, entry: Entry) -> None:
        self._replicas[entry.replica] = Replica(entry, self._heard)

    def _heard(self, replica: Replica) -> None:
        """A replica has introduced itself, begun to drain, or is gone: it may only have been slow, or cut off."""
        if not replica.alive and self._entries.get(replica.entry.replica) == replica.entry:
            asyncio.get_running_loop().call_later(RECONNECT_S, self._reconnect, replica)
        self._bump()

    def _reconnect(self, replica: Replica) -> None:
        name = replica.entry.replica
        if self._replicas.get(name) is replica and self._entries.get(name) == replica.entry:
            self._connect(replica.entry)
