"""What is kept of a session or a snapshot: its tokens, and which state they have led to."""

import hashlib
import json
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from serving.errors import DataLossError, NotFoundError, UnavailableError
from serving.sessions.store import StateStore

ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
SESSION, SNAPSHOT = "session", "snapshot"


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

    @property
    def expires(self) -> float:
        return self.used + self.ttl_s


class Records:
    """Records and states in a store, by owner: nobody's are ever looked for among another's."""

    def __init__(self, store: StateStore):
        self._store = store

    def read(self, owner: str, kind: str, record_id: str) -> Record:
        """Raises NotFoundError for one that is unknown or expired, DataLossError for a damaged one."""
        missing = NotFoundError(f"{kind}_id = {record_id!r}: there is no such {kind}")
        if not ID.fullmatch(record_id):
            raise missing
        try:
            record = self._parse(self._store.get(_path(owner, kind, record_id)), kind, record_id)
        except KeyError:
            raise missing from None
        if record.owner != owner or record.id != record_id or record.kind != kind:
            raise missing
        if record.expires < time.time():
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

    def write(self, record: Record, state: bytes | None = None) -> Record:
        """Keep a record, and its new state where it has one; returns it as it was written. The state goes first: a
        record always finds its own."""
        old, record = record, replace(record, version=record.version + 1)
        if state is not None:
            digest = hashlib.blake2b(state, digest_size=20).hexdigest()
            record = replace(record, state=digest, state_bytes=len(state))
            self._store.put(_state_path(record), state)
        body = asdict(record)
        data = json.dumps({"record": body, "checksum": _checksum(body)}).encode()
        try:
            self._store.put(_path(record.owner, record.kind, record.id), data)
        except UnavailableError:
            if record.state != old.state or not old.version:
                self.drop_state(record)
            raise
        return record

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

    def delete(self, record: Record) -> None:
        self._store.delete(_path(record.owner, record.kind, record.id))
        self.drop_state(record)

    def discard(self, owner: str, kind: str, record_id: str) -> None:
        """Remove what is left of a damaged record."""
        self._store.delete(_path(owner, kind, record_id))
        for name in self._store.list(f"{_folder(owner)}/states"):
            if name.startswith(f"{record_id}."):
                self._store.delete(f"{_folder(owner)}/states/{name}")

    def drop_state(self, record: Record) -> None:
        """Remove a state that its record does not name any more; one that cannot be removed does no harm."""
        if record.state:
            with suppress(UnavailableError):
                self._store.delete(_state_path(record))

    def _forget(self, record: Record) -> None:
        """Remove what has expired, from a store that can be written to."""
        with suppress(UnavailableError):
            self.delete(record)

    def count(self, owner: str) -> int:
        """Of an owner's records, those included that have expired and not been noticed yet."""
        return sum(len(self._store.list(f"{_folder(owner)}/{kind}s")) for kind in (SESSION, SNAPSHOT))

    def all(self, owner: str) -> list[Record]:
        """All of an owner's records that are not expired; damaged ones are left out."""
        found = []
        for kind in (SESSION, SNAPSHOT):
            for name in self._store.list(f"{_folder(owner)}/{kind}s"):
                try:
                    data = self._store.get(f"{_folder(owner)}/{kind}s/{name}")
                    record = self._parse(data, kind, name.removesuffix(".json"))
                except (KeyError, DataLossError):
                    continue
                if record.expires < time.time():
                    self._forget(record)
                else:
                    found.append(record)
        return found

    def _parse(self, data: bytes, kind: str, record_id: str) -> Record:
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


def _state_path(record: Record) -> str:
    return f"{_folder(record.owner)}/states/{record.id}.{record.state}.safetensors"


def _folder(owner: str) -> str:
    return hashlib.blake2b(owner.encode(), digest_size=12).hexdigest()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()
