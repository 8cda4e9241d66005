"""What a gateway knows of its replicas."""

import asyncio
from typing import cast

import pytest

from serving.cluster.link import Entry
from serving.gateway.fleet import Fleet
from serving.gateway.replicas import Replica


async def test_a_change_before_the_waiting_begins_is_not_missed() -> None:
    fleet = Fleet(())
    waiting = asyncio.ensure_future(fleet.changed())  # a task of its own, as wait_for makes one
    fleet.update([])
    await asyncio.wait_for(waiting, 5)


async def test_a_replica_that_is_out_of_touch_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is connected again soon; one that is not listed is not coming back."""
    fleet, ready = Fleet(("m",)), list[Replica]()
    monkeypatch.setattr(fleet, "replicas", lambda model: ready)
    monkeypatch.setattr(fleet, "_connect", lambda entry: None)
    await asyncio.wait_for(fleet.returned("m"), 0.5)
    fleet.update([Entry("r", "m", "nowhere:1", "token")])
    waiting = asyncio.ensure_future(fleet.returned("m"))
    await asyncio.sleep(0)
    assert not waiting.done()
    ready.append(cast("Replica", object()))
    fleet._bump()
    await asyncio.wait_for(waiting, 0.5)
    ready.clear()
    monkeypatch.setattr("serving.gateway.fleet.RETURN_S", 0.01)
    await asyncio.wait_for(fleet.returned("m"), 5)  # nobody waits for ever
