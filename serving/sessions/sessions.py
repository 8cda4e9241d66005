"""What can be done with sessions, in no protocol's terms."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from serving.errors import (
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from serving.sessions.records import SESSION, SNAPSHOT, Record, Records
from serving.sessions.store import StateStore
from serving.sessions.sweep import Sweeper

P = ParamSpec("P")
T = TypeVar("T")

MAX_TTL_S = 366 * 86400.0
STORE_THREADS = 8
STORE_S = 30.0
"""That the store may take for one operation."""

SWEEP_S = 600.0
"""Between two looks for what has expired; what is expired goes with the first after records.GRACE_S."""


@dataclass(slots=True)
class Turn:
    """A session while something is generated within it."""

    record: Record
    state: bytes  # after a beginning of its tokens; empty where there is none
    _records: Records
    _run: Callable[..., Awaitable[Record]]

    async def commit(self, tokens: list[int], state: bytes | None) -> None:
        """The turn has been carried out: all that the session is to hold from now on, and, where there is a newer
        one, the state after a beginning of it. Raises AbortedError where another turn came in between, or
        NotFoundError where the session was deleted."""
        self.record = await self._run(self._commit, tokens, state)

    def _commit(self, tokens: list[int], state: bytes | None) -> Record:
        old = self._records.read(self.record.owner, SESSION, self.record.id)
        if old.version != self.record.version:
            raise AbortedError(f"session_id = {old.id!r}: another turn has come in between")
        changes = {"turns": old.turns + 1, "used": time.time(), "busy_until": 0.0}
        return self._records.update(old, state, tokens=tokens, **changes)


class Sessions:
    """The sessions and snapshots of all owners, in one store."""

    def __init__(self, store: StateStore, *, ttl_s: float, most: int):
        """`ttl_s` without use by default; `most` sessions and snapshots of one owner."""
        self._records = Records(store)
        self._ttl_s = ttl_s
        self._most = most
        self._busy: set[tuple[str, str]] = set()
        self._adding: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by owner
        self._threads = ThreadPoolExecutor(STORE_THREADS, "fathom-sessions")
        self._sweeper = Sweeper(store)
        self._sweeping: asyncio.Task[None] | None = None

    def keep_tidy(self) -> None:
        """Take what has expired out of the store, from time to time, from now on."""
        self._sweeping = asyncio.create_task(self._sweep())

    def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * SWEEP_S)  # gateways that start together take turns
            with suppress(UnavailableError):
                await asyncio.get_running_loop().run_in_executor(self._threads, self._sweeper.sweep)

    async def create(
        self, owner: str, model: str, fingerprint: str, ttl_s: float | None, session_id: str = ""
    ) -> Record:
        """`session_id`: drawn where it is not given; else the caller knows that there is none of that name.

        Raises InvalidArgumentError or OverloadedError."""
        now = time.time()
        record = Record(
            session_id or _new_id(), SESSION, owner, model, fingerprint, self._ttl(ttl_s), now, now
        )
        return await self._add(record)

    async def get(self, owner: str, session_id: str) -> Record:
        """Raises NotFoundError or DataLossError."""
        return await self._run(self._records.read, owner, SESSION, session_id)

    async def fork(self, owner: str, session_id: str, ttl_s: float | None) -> Record:
        """Raises NotFoundError, DataLossError or OverloadedError."""
        return await self._branch(owner, SESSION, session_id, SESSION, ttl_s)

    async def snapshot(self, owner: str, session_id: str, ttl_s: float | None) -> Record:
        """Raises NotFoundError, DataLossError or OverloadedError."""
        return await self._branch(owner, SESSION, session_id, SNAPSHOT, ttl_s)

    async def restore(
        self, owner: str, snapshot_id: str, fingerprints: dict[str, str], ttl_s: float | None
    ) -> Record:
        """`fingerprints` of the models that are served, by name. Raises NotFoundError, DataLossError,
        FailedPreconditionError or OverloadedError."""
        source = await self._run(self._records.read, owner, SNAPSHOT, snapshot_id)
        _check_model(source, fingerprints.get(source.model, ""))
        return await self._branch(owner, SNAPSHOT, snapshot_id, SESSION, ttl_s)

    async def all(self, owner: str) -> list[Record]:
        return await self._run(self._records.all, owner)

    async def delete(self, owner: str, kind: str, record_id: str) -> None:
        """Raises NotFoundError, or FailedPreconditionError for a session in use."""
        with self._alone(owner, record_id):
            try:
                await self._run(self._records.delete, owner, kind, record_id)
            except DataLossError:
                await self._run(self._records.discard, owner, kind, record_id)

    @asynccontextmanager
    async def turn(
        self, owner: str, session_id: str, model: str, fingerprint: str, lasts_s: float = 0.0
    ) -> AsyncIterator[Turn]:
        """A session to generate within; nobody else can meanwhile, here. It stays as it was unless the turn commits,
        and does not expire before the turn is over, at the latest after `lasts_s`.

        Raises NotFoundError, DataLossError, or FailedPreconditionError where it is in use or of another model."""
        with self._alone(owner, session_id):
            record = await self.get(owner, session_id)
            if record.model != model:
                raise FailedPreconditionError(f"session_id = {session_id!r}: it is of model {record.model!r}")
            _check_model(record, fingerprint)
            record, state = await self._run(self._records.whole, owner, SESSION, session_id)
            until = time.time() + lasts_s + 2 * STORE_S
            marked = record.expires < until
            if marked:
                record = await self._run(self._records.update, record, busy_until=until)
            turn = Turn(record, state, self._records, self._run)
            try:
                yield turn
            finally:
                if marked and turn.record is record:
                    await self._let_go(record)

    async def _let_go(self, record: Record) -> None:
        """A turn is over that committed nothing: the session has been used all the same."""
        with suppress(RequestError):
            await self._run(self._records.update, record, used=time.time(), busy_until=0.0)

    @contextmanager
    def _alone(self, owner: str, record_id: str) -> Iterator[None]:
        """Raises FailedPreconditionError."""
        key = owner, record_id
        if key in self._busy:
            raise FailedPreconditionError(f"session_id = {record_id!r}: it is in use")
        self._busy.add(key)
        try:
            yield
        finally:
            self._busy.discard(key)

    async def _run(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Work with the store, in threads of its own: a store that hangs holds up nobody else's. Raises
        UnavailableError after STORE_S; what was begun may yet be done."""
        begun = asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args, **named))
        try:
            return await asyncio.wait_for(begun, STORE_S)
        except TimeoutError:
            raise UnavailableError(f"the state store has not answered for {STORE_S:g} s") from None

    async def _branch(self, owner: str, kind: str, record_id: str, into: str, ttl_s: float | None) -> Record:
        """Another record that goes on from the same point, with a state of its own."""
        source, state = await self._run(self._records.whole, owner, kind, record_id)
        now = time.time()
        origin = source.id if into == SNAPSHOT else ""
        ttl = source.ttl_s if ttl_s is None else self._ttl(ttl_s)
        record = replace(
            source, id=_new_id(), kind=into, ttl_s=ttl, created=now, used=now, version=0, origin=origin
        )
        return await self._add(record, state or None)

    async def _add(self, record: Record, state: bytes | None = None) -> Record:
        """One at a time, so that no more are made than are allowed."""
        async with self._adding.setdefault(record.owner, asyncio.Lock()):
            return await self._run(self._add_one, record, state)

    def _add_one(self, record: Record, state: bytes | None) -> Record:
        full = self._records.count(record.owner) >= self._most
        if full and len(self._records.all(record.owner)) >= self._most:  # which forgets what has expired
            raise OverloadedError(f"there are {self._most} sessions and snapshots, and no more are allowed")
        return self._records.add(record, state)

    def _ttl(self, ttl_s: float | None) -> float:
        if ttl_s is None:
            return self._ttl_s
        if not 0 < ttl_s <= MAX_TTL_S:  # NaN is not
            raise InvalidArgumentError("ttl_s", ttl_s, f"must be above 0, at most {MAX_TTL_S:g}")
        return ttl_s


def _check_model(record: Record, fingerprint: str) -> None:
    if record.fingerprint != fingerprint:
        raise FailedPreconditionError(
            f"{record.kind}_id = {record.id!r}: it is of model {record.model!r} as it was served then; its weights, "
            "dtype or version are others now"
        )


def _new_id() -> str:
    return secrets.token_hex(18)  # never an option of a command, as one that begins with a dash would be
