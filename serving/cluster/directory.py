"""Where the replicas are: one small Ray actor that engines register with and gateways watch.

Ray Serve starts, checks, scales and replaces the replicas. Tokens, though, do not travel through its handles: they
are measured in ARCHITECTURE.md at 0.1 to 0.5 ms of a gateway's processor time a message, and an engine tick would
make one for each of its sequences. So a gateway talks to an engine over one stream of its own, and needs to know its
address. When the actor is gone, streams go on, and Ray restarts it; the replicas register again with their next beat.
"""

import asyncio
import time
from typing import Any

import ray

from serving.cluster.link import Entry

NAME = "fathom-directory"
NAMESPACE = "fathom"
BEAT_S = 1.0
LEASE_S = 5.0  # a replica that has not been heard of for so long is forgotten


class Directory:
    """Entries under a lease, and a version that grows with every change."""

    def __init__(self) -> None:
        self.version = 0
        self._entries: dict[str, tuple[Entry, float]] = {}
        self._changed = asyncio.Event()

    async def beat(self, entry: Entry) -> None:
        """Register a replica, or renew its lease."""
        known = self._entries.get(entry.replica)
        self._entries[entry.replica] = entry, time.monotonic() + LEASE_S
        if known is None or known[0] != entry:
            self._bump()

    async def leave(self, replica: str) -> None:
        if self._entries.pop(replica, None) is not None:
            self._bump()

    async def watch(self, version: int, timeout_s: float) -> tuple[int, list[Entry]]:
        """All entries, as soon as there is a version other than the given one, or after the timeout."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._expire()
            left = deadline - time.monotonic()
            if self.version != version or left <= 0:
                return self.version, [entry for entry, _ in self._entries.values()]
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, BEAT_S))
            except TimeoutError:
                continue

    def _expire(self) -> None:
        now = time.monotonic()
        for replica in [r for r, (_, until) in self._entries.items() if until < now]:
            del self._entries[replica]
            self._bump()

    def _bump(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()


def directory() -> Any:
    """The handle of this cluster's directory, started where there is none."""
    return (
        ray.remote(Directory)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1000,
        )
        .remote()
    )
