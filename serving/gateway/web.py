"""HTTP in no protocol's terms: bodies read within bounds, clients that hang up, errors, server-sent events."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, NoReturn, TypeVar

import grpc
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import InvalidArgumentError
from serving.gateway.status import AGAIN_S, status_of

T = TypeVar("T")

HTTP = {  # of each gRPC status: HTTP's, and OpenAI's type of error
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
    grpc.StatusCode.ABORTED: (409, "conflict_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.UNIMPLEMENTED: (501, "invalid_request_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "service_unavailable_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error"),
}
FIELD = re.compile(r"([A-Za-z_][\w.\[\]-]*)(?: = |: )")  # that a message begins with


class HttpError(Exception):
    """What HTTP itself has against a request."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The object in a body. Raises HttpError, InvalidArgumentError, or ClientGoneError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "unsupported_media_type", f"content-type = {kind!r}: must be application/json")
    body = await _read(request, max_bytes)
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except RecursionError:
        raise InvalidArgumentError("the body is nested too deeply") from None
    except ValueError as error:  # of UTF-8, too
        raise InvalidArgumentError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"the body must be a JSON object, not {type(value).__name__}")
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    """The body, unless it says that it is too long, or turns out to be."""
    too_long = HttpError(413, "request_too_large", f"the body has more than {max_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_long
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_long
    except ClientDisconnect:
        raise ClientGoneError from None
    return bytes(body)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client hangs up first, it is cancelled, and ClientGoneError raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events, as they come. Ends them when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes]):
        # x-accel-buffering: a proxy in front should not gather what is sent as it comes
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._first, self._events = first, events

    @classmethod
    async def begun(cls, request: Request, events: AsyncGenerator[bytes]) -> "Events":
        """With the first event already there: what goes wrong before it is raised, and has a status of its own."""
        try:
            return cls(await unless_gone(request.receive, _first(events)), events)
        except BaseException:
            await events.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            with suppress(ClientGoneError):
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _first(events: AsyncGenerator[bytes]) -> bytes:
    return await anext(events)


def event(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % dumps(data)


DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def answer(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def described(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP's status for an error, and OpenAI's form of it."""
    if isinstance(error, HttpError):
        return error.status, _form(str(error), "invalid_request_error", None, error.code)
    code = status_of(error)
    if code not in HTTP:
        return 500, _form("the server has failed; its log says how", "server_error", None, "internal")
    status, kind = HTTP[code]
    field = FIELD.match(str(error)) if status == 400 or status == 404 else None
    return status, _form(str(error), kind, field[1] if field else None, code.name.lower())


def _form(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: BaseException, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that has failed."""
    status, body = described(error)
    more = dict(headers or {})
    if status in (429, 503):
        more["retry-after"] = str(AGAIN_S)
    if status == 504:
        more["x-should-retry"] = "false"  # OpenAI's clients would ask for it all again
    return answer(body, more, status)
