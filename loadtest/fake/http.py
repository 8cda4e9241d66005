"""The fake server's OpenAI side: /v1/models and /v1/completions over HTTP/1.1."""

import asyncio
import json
import time
from typing import Any, cast

import httptools

from loadtest.fake.source import Fake, RefusedError


class HttpEnd(asyncio.Protocol):
    """A server's end of a connection. One request at a time, as HTTP/1.1 clients send them."""

    def __init__(self, fake: Fake):
        self._fake = fake
        self._transport = cast("asyncio.Transport", None)  # until connection_made
        self._parser = httptools.HttpRequestParser(self)
        self._now = 0.0
        self._path = self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    # -- httptools -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._path = self._body = b""

    def on_url(self, path: bytes) -> None:
        self._path += path

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        method = self._parser.get_method()
        if (method, self._path) == (b"GET", b"/v1/models"):
            behaviour = self._fake.behaviour
            entry = {"id": behaviour.model, "object": "model", "max_model_len": behaviour.max_tokens}
            self._answer(200, {"object": "list", "data": [entry]})
        elif (method, self._path) == (b"POST", b"/v1/completions"):
            try:
                self._complete(json.loads(self._body))
            except RefusedError as refused:
                code = {"RESOURCE_EXHAUSTED": 429, "NOT_FOUND": 404}.get(refused.status, 500)
                self._answer(code, {"error": {"message": str(refused)}})
            except (ValueError, KeyError, AttributeError) as error:
                self._answer(400, {"error": {"message": f"not a completion: {error!r}"}})
        else:
            self._answer(404, {"error": {"message": f"no {self._path.decode()}"}})

    def _complete(self, request: dict[str, Any]) -> None:
        behaviour = self._fake.behaviour
        if request.get("model") not in ("", None, behaviour.model):
            raise RefusedError("NOT_FOUND", f"no model {request['model']}")
        asked, prompt = int(request.get("max_tokens", 16)), request["prompt"]
        length = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        usage = {"choices": [], "usage": {"prompt_tokens": length, "completion_tokens": asked}}
        opening = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        begun = False

        def emit(ids: list[int], last: bool) -> bool:
            nonlocal begun
            event = _chunk(_event({"choices": [{"index": 0, "text": " t" * len(ids)}]}))
            end = _chunk(_event(usage) + b"data: [DONE]\n\n") + _chunk(b"") if last else b""
            self._transport.write((b"" if begun else opening) + event + end)
            begun = True
            return not self._transport.is_closing()

        self._fake.generate(self._now, asked, emit)

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {code} -\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
