"""OpenAI's HTTP protocol: /v1/completions, streamed as server-sent events."""

import asyncio
import json
import time
from itertools import pairwise
from typing import Any

from loadtest.config import Server
from loadtest.core import Done, Handle, Model, Request, Sample
from loadtest.errors import FlagError, TargetError
from loadtest.transports.channel import CONNECT_TIMEOUT, reason
from loadtest.transports.http1 import Client, Exchange


class OpenAiTransport:
    streams = True

    def __init__(self, server: Server):
        self._server = server
        self._name = server.model
        self._client = Client(server)

    async def connect(self) -> Model:
        await self._reach()
        models = await self._models()
        wanted = self._server.model
        if models is None and not wanted:
            raise FlagError("--model", None, "is required: the server does not list its models")
        if models is not None and wanted not in models and (wanted or len(models) != 1):
            raise FlagError(
                "--model", wanted, f"must be one of {', '.join(sorted(models)) or '(none is served)'}"
            )
        entry = models[wanted] if models and wanted else next(iter(models.values())) if models else {}
        self._name = wanted or str(entry["id"])
        return Model(name=self._name, max_tokens=int(entry.get("max_model_len") or 0))

    async def _reach(self) -> None:
        deadline = time.monotonic() + self._server.wait
        while True:
            try:
                return await self._client.connect()
            except (OSError, TimeoutError) as error:
                if time.monotonic() >= deadline:
                    why = reason(error)
                    target = self._server.target
                    raise TargetError(f"--target {target}: cannot be reached over HTTP: {why}") from None
                await asyncio.sleep(0.2)

    async def _models(self) -> dict[str, dict[str, Any]] | None:
        """By name; None where the server has no list."""
        target = self._server.target
        listing = _Whole(self._client.request("GET", "/v1/models"))
        self._client.send(listing)
        try:
            failure = await asyncio.wait_for(listing.done, CONNECT_TIMEOUT)
        except TimeoutError as error:
            failure = reason(error)
        if failure:
            raise TargetError(f"--target {target}: listing its models: {failure}")
        if listing.status == 404:
            return None
        if listing.status != 200:
            raise TargetError(f"--target {target}: listing its models: HTTP status {listing.status}")
        try:
            return {str(entry["id"]): entry for entry in json.loads(listing.body)["data"]}
        except (ValueError, KeyError, TypeError):
            raise TargetError(f"--target {target}: its list of models is not OpenAI's") from None

    def encode(self, request: Request) -> bytes:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._name,
            "prompt": request.text if request.tokens is None else request.tokens,
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": request.seed,
            "ignore_eos": True if sampling.ignore_eos else None,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        given = {name: value for name, value in body.items() if value is not None}
        return self._client.request("POST", "/v1/completions", json.dumps(given).encode())

    def send(self, encoded: bytes, sample: Sample, done: Done) -> Handle:
        completion = _Completion(encoded, sample, done)
        self._client.send(completion)
        return completion

    async def close(self) -> None:
        await self._client.close()


class _Whole(Exchange):
    """An answer as one."""

    def __init__(self, request: bytes):
        super().__init__(request)
        self.body = b""
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_body(self, now: float, data: bytes) -> None:
        self.body += data

    def on_end(self, now: float, failure: str) -> None:
        if not self.done.done():
            self.done.set_result(failure)


class _Completion(Exchange):
    """An answer as server-sent events."""

    def __init__(self, request: bytes, sample: Sample, done: Done):
        super().__init__(request)
        self._sample = sample
        self._done = done
        self._rest = b""  # of a line that is not complete, or of the text of an error
        self._total = 0  # tokens, as the server counted them
        self._error = ""

    def cancel(self, status: str, detail: str) -> None:
        if not self.ended:
            self.abandon()
            self._finish(time.perf_counter(), status, detail)

    def on_body(self, now: float, data: bytes) -> None:
        if self.status != 200:
            self._rest += data[:500]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            count = sum(self._event(line[5:].strip()) for line in lines if line.startswith(b"data:"))
        except (ValueError, TypeError, AttributeError) as error:
            self._error = f"an event that is not OpenAI's: {error}"
            return
        if count:
            self._sample.arrived(now, count)

    def on_end(self, now: float, failure: str) -> None:
        sample = self._sample
        if failure:
            return self._finish(now, "UNAVAILABLE", failure)
        if self.status != 200:
            return self._finish(now, f"HTTP_{self.status}", self._rest.decode(errors="replace"))
        if self._error:
            return self._finish(now, "UNKNOWN", self._error)
        if self._total and sample.stamps:
            counts = spread(self._total, len(sample.stamps))
            sample.stamps = [stamp for stamp, count in zip(sample.stamps, counts, strict=True) if count]
            sample.counts = [count for count in counts if count]
        return self._finish(now, "OK", "")

    def _event(self, data: bytes) -> int:
        """Tokens in one event."""
        if data == b"[DONE]":
            return 0
        event = json.loads(data)
        if error := event.get("error"):
            self._error = str(error.get("message", error) if isinstance(error, dict) else error)
        if usage := event.get("usage"):
            self._total = int(usage.get("completion_tokens") or 0)
            self._sample.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            details = usage.get("prompt_tokens_details") or {}
            self._sample.cached_tokens = int(details.get("cached_tokens") or 0)
        text = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
        if self._sample.keep:
            self._sample.text += text
        return 1 if text else 0

    def _finish(self, now: float, status: str, detail: str) -> None:
        self._sample.finish(now, status, detail)
        self._done(self._sample)


def spread(total: int, messages: int) -> list[int]:
    """The tokens of each message where only their sum is known: as even as can be, the first ones more."""
    ends = [-(-total * i // messages) for i in range(messages + 1)]
    return [b - a for a, b in pairwise(ends)]
