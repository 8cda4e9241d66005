"""A fake server in a thread of its own, so that the harness can run its own event loop."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from loadtest.fake import Behaviour, Fake, serve

Start = Callable[..., "tuple[Fake, str]"]


@pytest.fixture
def start_fake() -> Iterator[Start]:
    """Call with the fields of Behaviour; gives the server's state and its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started: list[tuple[Fake, asyncio.Server]] = []

    def start(ttft: float = 0.01, itl: float = 0.001, **fields: object) -> tuple[Fake, str]:
        made = serve(Behaviour(ttft, itl, **fields))  # type: ignore[arg-type]
        fake, server = asyncio.run_coroutine_threadsafe(made, loop).result(20)
        started.append((fake, server))
        return fake, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    yield start

    async def stop() -> None:
        for fake, server in started:
            server.close()
            fake.clock.close()

    asyncio.run_coroutine_threadsafe(stop(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()
