"""Sequences of the Open Inference Protocol as sessions."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from weakref import WeakValueDictionary

from serving.errors import NotFoundError
from serving.gateway.fleet import Fleet
from serving.gateway.oip_convert import Infer
from serving.gateway.requests import Ask, Requests
from serving.sessions.records import SESSION


class Sequences:
    """A sequence is a session that its client has named: any gateway finds it by that name. Its requests go one after
    the other, in the order in which they came; clients send the next without waiting."""

    def __init__(self, requests: Requests, fleet: Fleet):
        self._requests = requests
        self._fleet = fleet
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def ask(self, infer: Infer) -> AsyncIterator[Ask]:
        """What is asked of the session. Raises RequestError, NotFoundError for a sequence that nobody has started."""
        sequence = infer.sequence
        if sequence is None:
            yield infer.ask
            return
        caller = self._requests.keys.authenticate(infer.ask.credential)
        model = self._fleet.resolve(infer.ask.model)
        caller.check(model)
        session = _session_id(model, sequence.id)
        turn = self._turns.setdefault((caller.name, session), asyncio.Lock())
        sessions = self._requests.sessions
        async with turn:
            if sequence.start:
                with suppress(NotFoundError):  # one of that name that was never ended
                    await sessions.delete(caller.name, SESSION, session)
                fingerprint = self._fleet.describe(model)[0].identity
                await sessions.create(caller.name, model, fingerprint, None, session)
            else:
                try:
                    await sessions.get(caller.name, session)
                except NotFoundError:
                    what = "there is no such sequence: its first request has sequence_start"
                    raise NotFoundError(f"sequence_id = {sequence.id!r}: {what}") from None
            try:
                yield replace(infer.ask, session_id=session)
            finally:
                if sequence.end:
                    with suppress(NotFoundError):
                        await sessions.delete(caller.name, SESSION, session)


def _session_id(model: str, sequence_id: str) -> str:
    return "sequence-" + hashlib.sha256(f"{model}\0{sequence_id}".encode()).hexdigest()[:40]
