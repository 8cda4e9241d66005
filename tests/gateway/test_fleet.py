"""What a gateway knows of its replicas."""

import asyncio

from serving.gateway.fleet import Fleet


async def test_a_change_before_the_waiting_begins_is_not_missed() -> None:
    fleet = Fleet(())
    waiting = asyncio.ensure_future(fleet.changed())  # a task of its own, as wait_for makes one
    fleet.update([])
    await asyncio.wait_for(waiting, 5)
