"""OpenAI's HTTP protocol: completions of prompts and of conversations, embeddings, models."""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tokenizers import Tokenizer

from serving.config import GatewaySpec
from serving.engine.news import FinishReason, Output, Usage
from serving.engine.params import SamplingParams
from serving.errors import FailedPreconditionError, InvalidArgumentError, RequestError
from serving.gateway.fleet import Fleet
from serving.gateway.keys import credential_of
from serving.gateway.merge import each, merged
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.openai_answer import Answers, Part, embedding_of, model_from, usage_from
from serving.gateway.openai_body import (
    Chat,
    Completion,
    Embedding,
    Headers,
    Work,
    chat_from,
    completion_from,
    embedding_asks,
    messages_from,
)
from serving.gateway.requests import Ask, Piece, Requests, unique
from serving.gateway.status import status_of
from serving.gateway.web import (
    DONE,
    ClientGoneError,
    Events,
    HttpError,
    answer,
    described,
    event,
    read_json,
    refusal,
    unless_gone,
)
from serving.text import Detokenizer

log = logging.getLogger("fathom.gateway")

EMBEDDINGS_AT_A_TIME = 64  # of one request
Handler = Callable[[Request, Headers], Awaitable[Response]]


class OpenAi:
    """The routes under /v1."""

    def __init__(self, requests: Requests, fleet: Fleet, spec: GatewaySpec, metrics: GatewayMetrics):
        self._requests = requests
        self._fleet = fleet
        self._max_bytes = int(spec.max_message_mb * (1 << 20))
        self._metrics = metrics
        self._created = int(time.time())
        self.routes = [
            self._route("POST", "/v1/completions", self._completions, "generate"),
            self._route("POST", "/v1/chat/completions", self._chat, "generate"),
            self._route("POST", "/v1/embeddings", self._embeddings, "embed"),
            self._route("GET", "/v1/models", self._models),
            self._route("GET", "/v1/models/{model}", self._model),
        ]

    def _route(self, verb: str, path: str, handler: Handler, work: str = "") -> Route:
        """Every failure is answered in OpenAI's form; every request is counted once, a stream when it ends. `work`:
        what listeners call it; refused before its body has been read where there is no room."""
        name = path.removeprefix("/v1/")

        async def endpoint(request: Request) -> Response:
            # Ray's ingress sends it back
            request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
            outcome = "CANCELLED"
            try:
                traceparent = request.headers.get("traceparent", "")
                headers = Headers(request_id, traceparent, credential_of(request.headers))
                full = work and self._requests.full(work, headers.credential, request_id, traceparent)
                if full:
                    raise full
                response = await handler(request, headers)
                outcome = "" if isinstance(response, Events) else "OK"
            except ClientGoneError:
                return Response(status_code=499)  # nobody reads it
            except Exception as error:
                outcome = _outcome(error)
                self._log(name, request_id, error)
                return refusal(error)
            finally:
                if outcome:
                    self._metrics.ended(name, outcome)
            return response

        return Route(path, endpoint, methods=[verb])

    def _log(self, name: str, request_id: str, error: Exception) -> None:
        if not isinstance(error, (RequestError, HttpError)):
            log.error("/v1/%s failed, request %s", name, request_id, exc_info=error)

    async def _completions(self, request: Request, headers: Headers) -> Response:
        body = Completion.read(await read_json(request, self._max_bytes))
        return await self._complete(request, completion_from(body, headers), headers)

    async def _chat(self, request: Request, headers: Headers) -> Response:
        body = Chat.read(await read_json(request, self._max_bytes))
        messages = messages_from(body)
        self._requests.keys.authenticate(headers.credential)  # before the template has any work
        model = self._fleet.resolve(body.model)
        template = self._fleet.describe(model)[1][0].chat
        if template is None:
            raise FailedPreconditionError(f"model {model!r} has no chat template: use /v1/completions")
        options = {"add_generation_prompt": body.add_generation_prompt, **body.chat_template_kwargs}
        prompt = await asyncio.to_thread(template.render, messages, **options)
        return await self._complete(request, chat_from(body, prompt, headers), headers)

    async def _complete(self, request: Request, work: Work, headers: Headers) -> Response:
        self._requests.keys.authenticate(headers.credential)  # before any model is named
        model = self._fleet.resolve(work.body.model)
        tokenizer = self._fleet.describe(model)[1][0].tokenizer
        answers = Answers(work, model, headers.request_id, tokenizer)
        if work.body.stream:
            return await Events.begun(request, self._events(work, answers, tokenizer, headers))
        _ = work.body.usage_at_end  # says what is wrong with stream_options
        return answer(await unless_gone(request.receive, self._whole(work, answers, tokenizer)))

    async def _whole(self, work: Work, answers: Answers, tokenizer: Tokenizer | None) -> dict[str, Any]:
        parts = [Part(index) for index in range(len(work.asks) * work.body.n)]
        usages: list[Usage] = []
        async with aclosing(self._parts(work, tokenizer)) as news:
            async for part in news:
                if part.news.usage is not None:
                    usages.append(part.news.usage)
                parts[part.index].extend(part)
        return answers.whole(parts, usage_from(usages))

    async def _events(
        self, work: Work, answers: Answers, tokenizer: Tokenizer | None, headers: Headers
    ) -> AsyncGenerator[bytes]:
        """What goes wrong after the first event is told in the last one, since the status has been sent."""
        name = "chat/completions" if work.chat else "completions"
        usages: list[Usage] = []
        outcome = ""  # nothing to count before the first event
        with_usage = work.body.usage_at_end
        try:
            async with aclosing(self._parts(work, tokenizer)) as news:
                async for part in news:
                    outcome = "CANCELLED"
                    if part.news.usage is not None:
                        usages.append(part.news.usage)
                    yield event(answers.chunk(part))
            outcome = "OK"
            if with_usage:
                yield event(answers.last(usage_from(usages)))
            yield DONE
        except Exception as error:
            if not outcome:
                raise
            outcome = _outcome(error)
            self._log(name, headers.request_id, error)
            yield event(described(error)[1])
        finally:
            if outcome:
                self._metrics.ended(name, outcome)

    async def _parts(self, work: Work, tokenizer: Tokenizer | None) -> AsyncGenerator[Part]:
        """The news of all choices: those of the first prompt, then those of the next ..."""

        async def of_one(number: int, ask: Ask) -> AsyncGenerator[Part]:
            async with aclosing(self._pieces(work, ask, tokenizer)) as pieces:
                async for piece in pieces:
                    yield Part.of(piece, number * work.body.n + piece.index)

        sources = [of_one(number, ask) for number, ask in enumerate(work.asks)]
        async with aclosing(sources[0] if len(sources) == 1 else merged(each(sources))) as parts:
            async for part in parts:
                yield part

    async def _pieces(self, work: Work, ask: Ask, tokenizer: Tokenizer | None) -> AsyncGenerator[Piece]:
        """One prompt's: itself where it is echoed, then what comes after it."""
        if work.echo:
            text, lengths, out = await self._echoed(work, ask, tokenizer)
            usage, out.usage = out.usage, None
            for index in range(ask.params.n):
                mine = replace(out, index=index)
                if not work.generates:
                    mine.finish_reason = FinishReason.LENGTH
                    mine.usage = usage if index == 0 else None
                yield Piece("", index, text, mine, list(lengths))
        if work.generates:
            async with aclosing(self._requests.generate(ask)) as pieces:
                async for piece in pieces:
                    yield piece

    async def _echoed(
        self, work: Work, ask: Ask, tokenizer: Tokenizer | None
    ) -> tuple[str, list[int], Output]:
        """A prompt as text, with its tokens and their log-probabilities where these are asked for."""
        if tokenizer is None:
            raise InvalidArgumentError("echo", True, "needs a tokenizer, which this model does not have")
        if not work.logprobs and work.generates:
            known = ask.prompt if isinstance(ask.prompt, str) else tokenizer.decode(ask.prompt)
            return known, [], Output("", 0)
        params = SamplingParams(logprobs=ask.params.logprobs, depth=ask.params.depth)
        ids, scored = await self._requests.score(
            replace(ask, params=params, request_id=unique(ask.request_id.partition(".")[0]))
        )
        out = Output("", 0, ids, [0, *scored.depths], [0, *scored.exit_reasons], usage=scored.usage)
        if work.logprobs:
            out.logprobs = [math.nan, *scored.logprobs]
            out.top_logprobs = [{}, *scored.top_logprobs] if scored.top_logprobs else []
        detokenizer = Detokenizer(tokenizer)
        texts = [detokenizer.feed(token) for token in ids]
        return "".join(texts) + detokenizer.flush(), [len(text) for text in texts], out

    async def _embeddings(self, request: Request, headers: Headers) -> Response:
        body = Embedding.read(await read_json(request, self._max_bytes))
        asks = embedding_asks(body, headers)
        outs = await unless_gone(request.receive, self._embedded(asks, body.pooling))
        size = len(outs[0].embedding)
        if body.dimensions is not None and body.dimensions > size:
            raise InvalidArgumentError("dimensions", body.dimensions, f"this model's vectors have {size}")
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": embedding_of(out.embedding, body.dimensions, body.encoding_format),
            }
            for index, out in enumerate(outs)
        ]
        tokens = sum(out.usage.prompt_tokens for out in outs if out.usage is not None)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        model = self._fleet.resolve(body.model)
        return answer({"object": "list", "data": data, "model": model, "usage": usage})

    async def _embedded(self, asks: Sequence[Ask], pooling: str) -> list[Output]:
        gate = asyncio.Semaphore(EMBEDDINGS_AT_A_TIME)

        async def one(ask: Ask) -> Output:
            async with gate:
                return (await self._requests.embed(ask, pooling))[1]

        tasks = [asyncio.create_task(one(ask)) for ask in asks]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _models(self, request: Request, headers: Headers) -> Response:
        caller = self._requests.keys.authenticate(headers.credential)
        ready = [m for m in self._fleet.models if self._fleet.replicas(m) and caller.may_use(m)]
        return answer({"object": "list", "data": [self._described(name) for name in ready]})

    async def _model(self, request: Request, headers: Headers) -> Response:
        caller = self._requests.keys.authenticate(headers.credential)
        name = self._fleet.resolve(request.path_params["model"])
        caller.check(name)
        return answer(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        description, replicas = self._fleet.describe(name)
        slots = sum(replica.load.slots for replica in replicas)
        chats = replicas[0].chat is not None
        return {**model_from(description, self._created, len(replicas), slots), "has_chat_template": chats}


def _outcome(error: Exception) -> str:
    return error.code.upper() if isinstance(error, HttpError) else status_of(error).name
