"""The fake server's OpenAI side: /v1/models and /v1/completions, over aiohttp."""

import asyncio
import json
from typing import Any

from aiohttp import web

from loadtest.fake.source import Fake, RefusedError


class Http:
    def __init__(self, fake: Fake):
        self._fake = fake

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        now = self._fake.clock.now()
        if request.method == "GET" and request.path == "/v1/models":
            behaviour = self._fake.behaviour
            entry = {"id": behaviour.model, "object": "model", "max_model_len": behaviour.max_tokens}
            return web.json_response({"object": "list", "data": [entry]})
        if request.method == "POST" and request.path == "/v1/completions":
            return await self._complete(now, request)
        return web.json_response({"error": {"message": f"no {request.path}"}}, status=404)

    async def _complete(self, now: float, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.json()
        if body.get("model") not in ("", None, self._fake.behaviour.model):
            return web.json_response({"error": {"message": f"no model {body['model']}"}}, status=404)
        asked, prompt = int(body.get("max_tokens", 16)), body["prompt"]
        messages: asyncio.Queue[tuple[list[int], bool]] = asyncio.Queue()
        listening = [True]

        def emit(ids: list[int], last: bool) -> bool:
            messages.put_nowait((ids, last))
            return listening[0]

        try:
            self._fake.generate(now, asked, emit)
        except RefusedError as refusal:
            code = 429 if refusal.status == "RESOURCE_EXHAUSTED" else 500
            return web.json_response({"error": {"message": str(refusal)}}, status=code)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            await response.prepare(request)
            last = False
            while not last:
                ids, last = await messages.get()
                await response.write(_event({"choices": [{"index": 0, "text": " t" * len(ids)}]}))
            length = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
            usage = {"prompt_tokens": length, "completion_tokens": asked}
            await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
            await response.write_eof()
        finally:
            listening[0] = False
        return response


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
