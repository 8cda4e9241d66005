"""What is kept of a session or a snapshot: its tokens, and which state they have led to."""

import hashlib
import json
import math
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from serving.errors import AbortedError, DataLossError, NotFoundError, UnavailableError
from serving.sessions.store import StateStore

ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
SESSION, SNAPSHOT = "session", "snapshot"

GRACE_S = 120.0
"""After it has expired, in which a record is not taken away yet: somebody may be about to say that it is in use."""


DELETED = -1.0
"""The time to live that the last version of a deleted record has: whoever does not know of it sees it expired."""


@dataclass(frozen=True, slots=True)
class Record:
    """A session, or a snapshot of one, as it is kept."""

    id: str
    kind: str
    owner: str
    model: str
    fingerprint: str
    ttl_s: float
    created: float  # seconds since 1970
    used: float
    tokens: list[int] = field(default_factory=list)
    turns: int = 0
    state: str = ""  # digest of the state after a beginning of the tokens; "" where there is none yet
    state_bytes: int = 0
    version: int = 0  # grows with every write
    origin: str = ""  # of a snapshot: its session
    busy_until: float = 0.0  # by then a turn is over that would outlast it

    @property
    def expires(self) -> float:
        return max(self.used + self.ttl_s, self.busy_until)

    @property
    def gone(self) -> bool:
        """Expired or deleted."""
        return self.ttl_s == DELETED or self.expires < time.time()

    @property
    def life(self) -> str:
        """Another record of its name begins to count versions anew."""
        return f"{self.id}.{int(self.created * 1e6)}"


class Records:
    """Records and states in a store, by owner: nobody's are ever looked for among another's.

    A record is rewritten by whoever is first to create the file of its next version, which holds all of it; the
    record's own file is put in place after that. A writer that stops in between has written: whoever reads finds the
    newer version. The file of the present version stays, so that nobody who comes late can create it once more.

    A deletion is a version too, the last one: it stays for GRACE_S, so that nobody who comes late
    brings the record back."""

    def __init__(self, store: StateStore):
        self._store = store
        self._deleted: deque[Record] = deque()  # whose last versions are still in the store

    def read(self, owner: str, kind: str, record_id: str) -> Record:
        """Raises NotFoundError for one that is unknown or expired, DataLossError for a damaged one."""
        missing = NotFoundError(f"{kind}_id = {record_id!r}: there is no such {kind}")
        if not ID.fullmatch(record_id):
            raise missing
        try:
            record = parsed(self._store.get(_path(owner, kind, record_id)), kind, record_id)
        except KeyError:
            raise missing from None
        if record.owner != owner or record.id != record_id or record.kind != kind:
            raise missing
        record = self._newest(record, self._latest(owner))
        if record.gone:
            self._forget(record)
            raise missing
        return record

    def whole(self, owner: str, kind: str, record_id: str) -> tuple[Record, bytes]:
        """A record and its state, of the same moment. Raises as `read` and `state` do."""
        record = self.read(owner, kind, record_id)
        while True:
            try:
                return record, self.state(record)
            except DataLossError:  # or a turn has been committed meanwhile, which takes the old state away
                again = self.read(owner, kind, record_id)
                if again.version == record.version:
                    raise
                record = again

    def add(self, record: Record, state: bytes | None = None) -> Record:
        """Keep a new record, and its state where it has one; returns it as it was written. The state goes first: a
        record always finds its own."""
        record = self._with_state(replace(record, version=1), state)
        try:
            self._store.put(_path(record.owner, record.kind, record.id), _written(record))
        except UnavailableError:
            self.drop_state(record)
            raise
        return record

    def update(self, old: Record, state: bytes | None = None, **changes: Any) -> Record:
        """Write a record anew, as long as it is what it was; returns it. Raises AbortedError where it is not."""
        new = self._with_state(replace(old, version=old.version + 1, **changes), state)
        data = _written(new)
        first = self._store.create(_version_path(new), data)
        if not first or self._latest(new.owner)[new.life] > new.version:
            self._yield_to_others(new)
            raise AbortedError(f"{old.kind}_id = {old.id!r}: another turn or a deletion has come in between")
        with suppress(UnavailableError):  # it is written; who reads will put it in its place
            self._store.put(_path(new.owner, new.kind, new.id), data)
        self._drop_versions(new, below=new.version)
        if new.state != old.state:
            self.drop_state(old)
        return new

    def _with_state(self, record: Record, state: bytes | None) -> Record:
        if state is None:
            return record
        digest = hashlib.blake2b(state, digest_size=20).hexdigest()
        record = replace(record, state=digest, state_bytes=len(state))
        self._store.put(_state_path(record), state)
        return record

    def _yield_to_others(self, mine: Record) -> None:
        """Leave nothing behind of a version that came too late."""
        if self._latest(mine.owner).get(mine.life, 0) > mine.version:
            self._drop_versions(mine, below=mine.version + 1)
        try:
            kept = self.read(mine.owner, mine.kind, mine.id).state
        except (NotFoundError, DataLossError):
            kept = ""
        if kept != mine.state:
            self.drop_state(mine)

    def _newest(self, record: Record, latest: dict[str, int]) -> Record:
        """The record in its newest version, put in its place where it was not there yet."""
        version = latest.get(record.life, 0)
        if version <= record.version:
            return record
        try:
            data = self._store.get(_version_path(replace(record, version=version)))
            record = parsed(data, record.kind, record.id)
        except (KeyError, DataLossError):  # it is being removed, or was not written whole
            return record
        if not record.gone:
            with suppress(UnavailableError):
                self._store.put(_path(record.owner, record.kind, record.id), data)
        return record

    def _latest(self, owner: str) -> dict[str, int]:
        """The newest version, by life, of an owner's records that have been rewritten."""
        latest: dict[str, int] = {}
        for life, version in self._versions(owner):
            latest[life] = max(version, latest.get(life, 0))
        return latest

    def _versions(self, owner: str) -> Iterator[tuple[str, int]]:
        """Of which there are files, and of which life each is."""
        for name in self._store.list(f"{_folder(owner)}/versions"):
            life, _, version = name.rpartition(".")
            if version.isdecimal():
                yield life, int(version)

    def _drop_versions(self, record: Record, below: float = math.inf) -> None:
        with suppress(UnavailableError):
            for life, version in self._versions(record.owner):
                if life == record.life and version < below:
                    self._store.delete(_version_path(replace(record, version=version)))

    def state(self, record: Record) -> bytes:
        """Its kept state; empty where there is none. Raises DataLossError."""
        if not record.state:
            return b""
        try:
            data = self._store.get(_state_path(record))
        except KeyError:
            raise DataLossError(f"the state of {record.kind} {record.id!r} is missing") from None
        if hashlib.blake2b(data, digest_size=20).hexdigest() != record.state:
            raise DataLossError(f"the state of {record.kind} {record.id!r} is damaged")
        return data

    def delete(self, owner: str, kind: str, record_id: str) -> None:
        """After this there is no such record, whatever turn is being committed at the same time. Raises NotFoundError
        or DataLossError."""
        self._bury()
        tried = 0
        while True:
            record = self.read(owner, kind, record_id)
            if record.version == tried:
                raise DataLossError(f"{kind}_id = {record_id!r}: its next version is damaged")
            tried = record.version
            emptied = replace(record, tokens=[], state="", state_bytes=0)
            with suppress(AbortedError):  # a turn was quicker
                last = self.update(emptied, ttl_s=DELETED, used=time.time(), busy_until=0.0)
                break
        self._deleted.append(last)
        self.drop_state(record)
        with suppress(UnavailableError):  # it is deleted, whatever its file says
            self._store.delete(_path(owner, kind, record_id))

    def _bury(self) -> None:
        """Remove the last versions of what was deleted some time ago."""
        while self._deleted and self._deleted[0].expires + GRACE_S < time.time():
            with suppress(IndexError, UnavailableError):
                record = self._deleted.popleft()
                with suppress(NotFoundError, DataLossError):
                    self.read(record.owner, record.kind, record.id)  # forgets what a late writer has put back
                self._drop_versions(record)

    def discard(self, owner: str, kind: str, record_id: str) -> None:
        """Remove what is left of a damaged record."""
        self._store.delete(_path(owner, kind, record_id))
        for folder in ("states", "versions"):
            for name in self._store.list(f"{_folder(owner)}/{folder}"):
                if name.startswith(f"{record_id}."):
                    self._store.delete(f"{_folder(owner)}/{folder}/{name}")

    def drop_state(self, record: Record) -> None:
        """Remove a state that its record does not name any more; one that cannot be removed does no harm."""
        if record.state:
            with suppress(UnavailableError):
                self._store.delete(_state_path(record))

    def _forget(self, record: Record) -> None:
        """Remove what expired some time ago, from a store that can be written to."""
        if record.expires + GRACE_S < time.time():
            with suppress(UnavailableError):
                self._store.delete(_path(record.owner, record.kind, record.id))
                self.drop_state(record)
                self._drop_versions(record)

    def count(self, owner: str) -> int:
        """Of an owner's records, those included that have expired and not been noticed yet."""
        return sum(len(self._store.list(f"{_folder(owner)}/{kind}s")) for kind in (SESSION, SNAPSHOT))

    def all(self, owner: str) -> list[Record]:
        """All of an owner's records that are not expired; damaged ones are left out."""
        kept, found = [], []
        for kind in (SESSION, SNAPSHOT):
            for name in self._store.list(f"{_folder(owner)}/{kind}s"):
                with suppress(KeyError, DataLossError):
                    data = self._store.get(f"{_folder(owner)}/{kind}s/{name}")
                    kept.append(parsed(data, kind, name.removesuffix(".json")))
        latest = self._latest(owner)
        for record in kept:
            newest = self._newest(record, latest)
            if newest.gone:
                self._forget(newest)
            else:
                found.append(newest)
        return found


def parsed(data: bytes, kind: str, record_id: str) -> Record:
    """A record as it was written. Raises DataLossError."""
    damaged = DataLossError(f"{kind}_id = {record_id!r}: what was kept of it is damaged")
    try:
        outer = json.loads(data)
        if outer["checksum"] != _checksum(outer["record"]):
            raise damaged
        return Record(**outer["record"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None


def _path(owner: str, kind: str, record_id: str) -> str:
    return f"{_folder(owner)}/{kind}s/{record_id}.json"


def _version_path(record: Record) -> str:
    return f"{_folder(record.owner)}/versions/{record.life}.{record.version}"


def _state_path(record: Record) -> str:
    return f"{_folder(record.owner)}/states/{record.id}.{record.state}.safetensors"


def _folder(owner: str) -> str:
    return hashlib.blake2b(owner.encode(), digest_size=12).hexdigest()


def _written(record: Record) -> bytes:
    body = asdict(record)
    return json.dumps({"record": body, "checksum": _checksum(body)}).encode()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()
