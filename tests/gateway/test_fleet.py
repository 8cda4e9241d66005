"""What a gateway knows of its replicas, and how long it believes in them."""

import asyncio
import time
from typing import cast

import pytest

from serving.cluster.link import Entry
from serving.engine.core import Request
from serving.engine.news import FinishReason, Output, Usage
from serving.engine.params import SamplingParams
from serving.errors import DeadlineExceededError
from serving.gateway.fleet import Fleet
from serving.gateway.journey import OVERDUE_S, Journey
from serving.gateway.replicas import Mailbox, Replica


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


class Mute:
    """A replica that takes a request, and says what a test has it say."""

    entry = Entry("r", "m", "nowhere:1", "token")

    def submit(self, request: Request, timeout_s: float, some: asyncio.Event) -> Mailbox:
        self.mailbox = Mailbox(some)
        return self.mailbox

    def cancel(self, request_id: str, index: int | None = None) -> None: ...

    def forget(self, request_id: str) -> None: ...


def journey(replica: Mute, deadline: float) -> Journey:
    asked = Request("mine", [1], SamplingParams(max_tokens=9))
    made = Journey(Fleet(("m",)), "m", asked, deadline=deadline, resumes=True, patience_s=1.0)
    made.start(cast("Replica", replica))
    return made


async def test_a_replica_that_says_nothing_is_not_waited_for_beyond_the_deadline() -> None:
    overdue = journey(Mute(), time.monotonic() - OVERDUE_S)
    with pytest.raises(DeadlineExceededError, match="says nothing"):
        await anext(overdue.news())


async def test_what_a_replica_said_is_told_however_late_it_is_read() -> None:
    replica = Mute()
    late = journey(replica, time.monotonic() - OVERDUE_S)
    usage = Usage(1, 2, 1.0, 0.0, 0.0, 0.0)
    replica.mailbox.put(Output("theirs", 0, [4, 5], [1, 1], finish_reason=FinishReason.DEADLINE, usage=usage))
    assert [out async for out in late.news()] == [
        Output("mine", 0, [4, 5], [1, 1], finish_reason=FinishReason.DEADLINE, usage=usage)
    ]
    assert late.given(0) == [4, 5]
