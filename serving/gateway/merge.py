"""Several streams as one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Coroutine, Iterable
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

WAITING = 64  # items that wait for the reader at a time; a source whose item finds no room waits


async def merged(sources: AsyncIterable[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """The items of all sources, each source's in their order, as they come; `sources` may bring new ones
    meanwhile. The failure of one, or closing the iterator, closes them all."""
    running = 1  # `feed`, and the sources that have not ended
    queue: asyncio.Queue[T | _Ended] = asyncio.Queue(WAITING)
    tasks: set[asyncio.Task[None]] = set()

    def start(work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def feed() -> None:
        nonlocal running
        error = None
        try:
            async for source in sources:
                running += 1
                start(drain(source))
        except Exception as raised:
            error = raised
        await queue.put(_Ended(error))

    async def drain(source: AsyncGenerator[T]) -> None:
        error = None
        try:
            async with aclosing(source):
                async for item in source:
                    await queue.put(item)
        except Exception as raised:
            error = raised
        await queue.put(_Ended(error))

    start(feed())
    try:
        while running:
            item = await queue.get()
            if not isinstance(item, _Ended):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                running -= 1
    finally:
        left = list(tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class _Ended:
    """A source has no more items, or failed."""

    def __init__(self, error: Exception | None):
        self.error = error


async def each(items: Iterable[T]) -> AsyncIterator[T]:
    """A plain iterable where an asynchronous one is asked for."""
    for item in items:
        yield item
