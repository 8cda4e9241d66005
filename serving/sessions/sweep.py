"""Takes what has expired, and what nothing leads to any more, out of the state store."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace

from serving.errors import DataLossError, NotFoundError
from serving.sessions.records import GRACE_S, SESSION, SNAPSHOT, Record, Records, parsed
from serving.sessions.store import StateStore

FOLDERS = f"{SESSION}s", f"{SNAPSHOT}s", "states", "versions"
OWNER = re.compile(r"[0-9a-f]{24}")


class Sweeper:
    """Any number of gateways may sweep one store. A record is read when it is first seen, and when it should have
    expired by what it said then."""

    def __init__(self, store: StateStore):
        self._store = store
        self._records = Records(store)
        self._seen: dict[str, Record] = {}  # by path, without their tokens
        self._loose: set[str] = set()  # paths that nothing led to the last time

    def sweep(self) -> None:
        """Once. What has lost its record only just now may be getting another, and what is written in part may yet be
        written whole: it goes with the next sweep, by when no writer has anybody who waits for it. Raises
        UnavailableError."""
        loose = set()
        for folder in filter(OWNER.fullmatch, self._store.list("")):
            records = dict(self._kept(folder))
            loose |= {f"{folder}/{path}" for path in self._leads_nowhere(folder, records)}
            loose |= {f"{folder}/{path}" for path in self._partial(folder)}
        for path in loose & self._loose:
            self._store.delete(path)
        self._loose = loose

    def _kept(self, folder: str) -> Iterator[tuple[str, Record | None]]:
        """The records of an owner that stay, by id; None where one is damaged, which its owner is to hear of."""
        for kind in (SESSION, SNAPSHOT):
            for name in self._store.list(f"{folder}/{kind}s"):
                path, record_id = f"{folder}/{kind}s/{name}", name.removesuffix(".json")
                try:
                    record = self._seen.get(path)
                    if record is None or record.expires + GRACE_S < time.time():
                        record = self._read(path, kind, record_id)
                    yield record_id, record
                except NotFoundError:
                    self._seen.pop(path, None)
                except DataLossError:
                    yield record_id, None

    def _read(self, path: str, kind: str, record_id: str) -> Record:
        """Raises NotFoundError for one that expired some time ago, and is gone by that."""
        try:
            record = parsed(self._store.get(path), kind, record_id)
        except KeyError:
            raise NotFoundError(path) from None
        if record.expires + GRACE_S < time.time():
            record = self._records.read(record.owner, kind, record_id)  # there may be a newer version
        self._seen[path] = replace(record, tokens=[])
        return record

    def _leads_nowhere(self, folder: str, records: dict[str, Record | None]) -> Iterator[str]:
        """States and versions that no record names; a deletion's is one, once the record's file is gone."""
        lives = {record.life for record in records.values() if record is not None}
        damaged = {record_id for record_id, record in records.items() if record is None}
        for name in self._store.list(f"{folder}/versions"):
            if name.rpartition(".")[0] not in lives and name.partition(".")[0] not in damaged:
                yield f"versions/{name}"
        for name in self._store.list(f"{folder}/states"):
            record_id, _, digest = name.removesuffix(".safetensors").partition(".")
            if record_id not in records or not self._names(folder, records[record_id], digest):
                yield f"states/{name}"

    def _partial(self, folder: str) -> Iterator[str]:
        """What is being written, or was by a writer that was killed; each writing has a name of its own."""
        for kind in FOLDERS:
            for name in self._store.list(f"{folder}/{kind}", partial=True):
                yield f"{kind}/{name}"

    def _names(self, folder: str, record: Record | None, digest: str) -> bool:
        """Whether this is the record's state, by what it says now; a damaged one may have any."""
        if record is None or record.state == digest:
            return True
        try:
            path = f"{folder}/{record.kind}s/{record.id}.json"
            return self._read(path, record.kind, record.id).state == digest
        except NotFoundError:
            return False
        except DataLossError:
            return True
