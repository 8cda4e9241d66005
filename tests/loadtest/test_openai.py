"""OpenAI's protocol over connections that split, stall, close and lie."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from loadtest.config import Server
from loadtest.core import Sample
from loadtest.errors import TargetError
from loadtest.transports.openai import OpenAiTransport
from tests.loadtest.test_http2 import ask, request

MODELS = b'HTTP/1.1 200 OK\r\ncontent-length: 24\r\n\r\n{"data": [{"id": "m"}]} '
START = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def event(text: str) -> bytes:
    return b'data: {"choices": [{"text": "%b"}]}\n\n' % text.encode()


BROKEN = b'data: {"error": {"message": "broke"}}\n\n'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


Answer = Callable[[bytes, asyncio.StreamWriter], Any]


@asynccontextmanager
async def scripted(answer: Answer) -> AsyncIterator[tuple[OpenAiTransport, list[bytes]]]:
    """A client of a server that gives every completion to `answer`; and the requests that it saw."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"content-length:"), 0
                )
                body = await reader.readexactly(length)
                if b"/v1/models" in head:
                    writer.write(MODELS)
                else:
                    seen.append(head + body)
                    await answer(body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = OpenAiTransport(
        Server.read({"target": f"127.0.0.1:{port}", "transport": "openai", "connections": 1})
    )
    await client.connect()
    try:
        yield client, seen
    finally:
        await client.close()
        server.close()


async def test_events_split_anywhere() -> None:
    whole = (
        event("a") + event("") + event("b") + b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n'
    )
    whole += b"data: [DONE]\n\n"

    async def answer(body: bytes, writer: asyncio.StreamWriter) -> None:
        stream = START + b"".join(chunk(whole[i : i + 7]) for i in range(0, len(whole), 7)) + chunk(b"")
        for i in range(0, len(stream), 5):
            writer.write(stream[i : i + 5])
            await asyncio.sleep(0)

    async with scripted(answer) as (client, seen):
        (sample,) = await ask(client, request(max_tokens=4), keep=True)
    assert (sample.status, sample.text, sum(sample.counts), sample.asked) == ("OK", "ab", 4, 4)
    assert b'"model": "m"' in seen[0] and b'"ignore_eos": true' in seen[0] and b'"stream": true' in seen[0]


async def test_connections_are_used_again_and_replaced_when_the_server_closed_them() -> None:
    writers: list[asyncio.StreamWriter] = []

    async def answer(body: bytes, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        if len(writers) == 3:
            writer.transport.abort()  # instead of an answer, on a connection that has served before
            return
        writer.write(START + chunk(event("a") + b"data: [DONE]\n\n") + chunk(b""))

    async with scripted(answer) as (client, seen):
        samples: list[Sample] = []
        for _ in range(3):
            samples += await ask(client, request())
    assert [sample.status for sample in samples] == ["OK"] * 3
    assert writers[0] is writers[1] is writers[2] is not writers[3] and len(seen) == 4


@pytest.mark.parametrize(
    ("raw", "status", "detail"),
    [
        (b"HTTP/1.1 429 Slow down\r\ncontent-length: 4\r\n\r\nbusy", "HTTP_429", "busy"),
(START + chunk(event("a")) + chunk(BROKEN) + chunk(b""), "UNKNOWN", "broke"),
        (START + chunk(b"data: <html>\n\n") + chunk(b""), "UNKNOWN", "an event that is not OpenAI's"),
        (START + chunk(event("a")), "UNAVAILABLE", "connection lost"),
        (b"SSH-2.0\r\n", "UNAVAILABLE", "it does not answer in HTTP/1.1"),
        (START + chunk(b"data: [DONE]\n\n") + chunk(b""), "NO_TOKENS", "without a token"),
    ],
    ids=["refused", "error event", "not JSON", "cut off", "not HTTP", "empty"],
)  # fmt: skip
async def test_failures(raw: bytes, status: str, detail: str) -> None:
    async def answer(body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        writer.close()

    async with scripted(answer) as (client, _):
        (sample,) = await ask(client, request())
        assert sample.status == status and detail in sample.detail


async def test_cancelling_ends_the_call_and_its_connection() -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def answer(body: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                writer.write(b"HTTP/1.1 200 OK\r\n" if not asked.is_set() else b"x: y\r\n")
                asked.set()
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    async with scripted(answer) as (client, _):
        sample, ended = Sample(0.0, 3), []
        handle = client.send(client.encode(request()), sample, ended.append)
        await asyncio.wait_for(asked.wait(), 20)
        handle.cancel("DEADLINE_EXCEEDED", "too long")
        handle.cancel("CANCELLED", "a second time does nothing")
        assert ended == [sample] and sample.status == "DEADLINE_EXCEEDED"
        await asyncio.wait_for(closed.wait(), 20)


async def test_a_server_that_lists_something_else() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]")

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = OpenAiTransport(Server.read({"target": target, "transport": "openai"}))
        with pytest.raises(TargetError, match="its list of models is not OpenAI's"):
            await client.connect()
        await client.close()
