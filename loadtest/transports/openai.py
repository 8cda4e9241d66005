"""OpenAI's HTTP protocol: /v1/completions, streamed as server-sent events."""

import asyncio
import json
import ssl
import time
from itertools import pairwise
from typing import Any

import aiohttp

from loadtest.config import Server
from loadtest.core import Done, Handle, Model, Request, Sample
from loadtest.errors import FlagError, TargetError
from loadtest.transports.channel import CONNECT_TIMEOUT, reason, tls_context


class OpenAiTransport:
    streams = True

    def __init__(self, server: Server):
        self._server = server
        self._name = server.model
        scheme = "https" if server.secure else "http"
        host = f"[{server.host}]" if ":" in server.host else server.host
        self._url = f"{scheme}://{host}:{server.port}/v1/"
        self._tls: ssl.SSLContext | bool = tls_context(server) or True
        self._session: aiohttp.ClientSession | None = None

    async def connect(self) -> Model:
        # HTTP/1.1 carries one answer at a time, so every request under way has a connection.
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls)
        headers = [*self._server.metadata, ("content-type", "application/json")]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
        self._session = aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout)
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

    async def _models(self) -> dict[str, dict[str, Any]] | None:
        """By name; None where the server has no list."""
        assert self._session
        target = self._server.target
        deadline = time.monotonic() + self._server.wait
        while True:
            try:
                async with self._session.get(self._url + "models") as response:
                    if response.status == 404:
                        return None
                    if response.status != 200:
                        raise TargetError(
                            f"--target {target}: listing its models: HTTP status {response.status}"
                        )
                    return {str(entry["id"]): entry for entry in (await response.json())["data"]}
            except (aiohttp.ClientError, TimeoutError) as error:
                if time.monotonic() >= deadline:
                    raise TargetError(
                        f"--target {target}: cannot be reached over HTTP: {reason(error)}"
                    ) from None
                await asyncio.sleep(0.2)
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
        return json.dumps({name: value for name, value in body.items() if value is not None}).encode()

    def send(self, encoded: bytes, sample: Sample, done: Done) -> Handle:
        assert self._session
        return _Completion(self._session, self._url + "completions", encoded, sample, done)

    async def close(self) -> None:
        if self._session:
            await self._session.close()


class _Completion:
    def __init__(self, session: aiohttp.ClientSession, url: str, body: bytes, sample: Sample, done: Done):
        self._sample = sample
        self._done = done
        self._error = ""
        self._total = 0  # tokens, as the server counted them
        self._task = asyncio.ensure_future(self._run(session, url, body))

    def cancel(self, status: str, detail: str) -> None:
        if not self._task.done() and not self._sample.status:
            self._task.cancel()
            self._finish(status, detail)

    async def _run(self, session: aiohttp.ClientSession, url: str, body: bytes) -> None:
        try:
            async with session.post(url, data=body) as response:
                if response.status != 200:
                    text = (await response.text())[:500]
                    return self._finish(f"HTTP_{response.status}", text)
                await self._read(response.content)
        except (aiohttp.ClientError, OSError) as error:
            return self._finish("UNAVAILABLE", reason(error))
        except (ValueError, TypeError, AttributeError) as error:
            return self._finish("UNKNOWN", f"an event that is not OpenAI's: {error}")
        if self._error:
            return self._finish("UNKNOWN", self._error)
        sample = self._sample
        if self._total and sample.stamps:
            counts = spread(self._total, len(sample.stamps))
            sample.stamps = [stamp for stamp, count in zip(sample.stamps, counts, strict=True) if count]
            sample.counts = [count for count in counts if count]
        return self._finish("OK", "")

    async def _read(self, content: aiohttp.StreamReader) -> None:
        rest = b""
        while chunk := await content.readany():
            now = time.perf_counter()
            *lines, rest = (rest + chunk).split(b"\n")
            count = sum(self._event(line[5:].strip()) for line in lines if line.startswith(b"data:"))
            if count:
                self._sample.arrived(now, count)

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

    def _finish(self, status: str, detail: str) -> None:
        if not self._sample.status:
            self._sample.finish(time.perf_counter(), status, detail)
            self._done(self._sample)


def spread(total: int, messages: int) -> list[int]:
    """The tokens of each message where only their sum is known: as even as can be, and one at least in the
    first."""
    ends = [-(-total * i // messages) for i in range(messages + 1)]
    return [b - a for a, b in pairwise(ends)]
