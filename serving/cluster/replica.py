"""An engine replica: one model, its engine in a thread, and the stream over which gateways use it."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from functools import partial

import grpc

from protos.fathom.internal.v1 import engine_pb2 as wire
from protos.fathom.internal.v1 import engine_pb2_grpc
from serving.cluster.convert import failure, request_from, tokens_from
from serving.cluster.link import SIGN_OF_LIFE_S, STREAM_OPTIONS, TOKEN_KEY
from serving.cluster.metrics import EngineMetrics
from serving.config import ModelSpec
from serving.engine.build import build
from serving.engine.core import Request
from serving.engine.loop import EngineLoop
from serving.engine.news import Failed, Load, News, Output
from serving.errors import RequestError
from serving.threads import use_threads

log = logging.getLogger("fathom.replica")


class EngineReplica(engine_pb2_grpc.EngineServicer):
    """The Engine service of one replica. Its methods run on an event loop, the engine in a thread of its own."""

    def __init__(self, spec: ModelSpec, replica: str, events: asyncio.AbstractEventLoop):
        """Loads the model. `events` is the loop that the service will run on."""
        self.metrics = EngineMetrics(spec.name, replica)
        engine, loaded, self.description = build(spec, self.metrics)
        self.metrics.describe(self.description)
        self._tokenizer = loaded.tokenizer.to_str().encode() if loaded.tokenizer is not None else b""
        self._chat = json.dumps(loaded.chat).encode() if loaded.chat else b""
        self._engine = engine
        self._loop = EngineLoop(engine, self._from_engine, partial(use_threads, spec.threads, spare=1))
        self._events = events
        self._links: dict[str, _Link] = {}  # request id -> the gateway's stream that it came from
        self._preparing: set[str] = set()  # requests that are not ready yet
        self._preparations: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self.token = secrets.token_hex(32)

    async def start(self, host: str, port: int = 0) -> str:
        """Serve; returns the address, host:port."""
        self._server = grpc.aio.server(options=STREAM_OPTIONS)
        engine_pb2_grpc.add_EngineServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"{host}:{port}")
        await self._server.start()
        self._loop.start()
        return f"{host}:{bound}"

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)
        await asyncio.to_thread(self._loop.stop)

    async def drain(self, timeout_s: float) -> None:
        """Hand all sequences over to the gateways, which take them to other replicas; at most so long."""
        self._loop.drain()
        until = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(SIGN_OF_LIFE_S)  # the streams take what there is at least so often
            if not self._links and not self._preparing:
                break

    @property
    def healthy(self) -> bool:
        """Not after several steps in a row have failed: something is broken that a new process may mend."""
        return self._loop.failures < 3

    async def Attach(  # noqa: N802
        self, requests: AsyncIterator[wire.Commands], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[wire.Events]:
        """Commands up, news down; a message holds all news since the last was taken."""
        await self._authenticate(context)
        link = _Link()
        reader = asyncio.create_task(self._read(requests, link))
        try:
            yield wire.Events(
                description=self.description.to_json(),
                tokenizer=self._tokenizer,
                chat=self._chat,
                load=self._load(),
            )
            while not reader.done():
                events = await link.take(SIGN_OF_LIFE_S)
                events.load.CopyFrom(self._load())
                yield events
        finally:
            reader.cancel()
            for request_id in [r for r, owner in self._links.items() if owner is link]:
                del self._links[request_id]
                self._loop.cancel(request_id)

    async def Metrics(  # noqa: N802
        self, request: wire.MetricsRequest, context: grpc.aio.ServicerContext
    ) -> wire.MetricsResponse:
        await self._authenticate(context)
        self.metrics.load(self._engine.load())
        return wire.MetricsResponse(text=self.metrics.text().decode())

    async def _authenticate(self, context: grpc.aio.ServicerContext) -> None:
        shown = dict(context.invocation_metadata() or ()).get(TOKEN_KEY, "")
        if not secrets.compare_digest(str(shown), self.token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not a gateway of this cluster")

    async def _read(self, messages: AsyncIterator[wire.Commands], link: "_Link") -> None:
        async for commands in messages:
            self._submit(commands.submits, link)
            for cancel in commands.cancels:
                self._cancel(cancel.request_id, cancel.index if cancel.HasField("index") else None)
            if commands.refused:
                self._loop.refused()

    def _submit(self, submits: Iterable[wire.Submit], link: "_Link") -> None:
        brought = []  # that came with nothing but a snapshot to prepare
        for submit in submits:
            try:
                request = request_from(submit, self._engine.clock())
            except RequestError as error:
                link.put([Failed(submit.request_id, error)])
                continue
            self._links[request.id] = link
            if request.params.grammar is not None:
                self._prepare([request], link)
            elif request.state:
                brought.append(request)
            else:
                self._loop.submit(request)
        if brought:
            self._prepare(brought, link)

    def _prepare(self, requests: list[Request], link: "_Link") -> None:
        """Submit requests after their grammars have been compiled and their snapshots read, in a thread: others need
        not wait for it. Those that are prepared together come to the engine together."""
        self._preparing.update(request.id for request in requests)
        task = asyncio.create_task(self._submit_prepared(requests, link))
        self._preparations.add(task)
        task.add_done_callback(self._preparations.discard)

    async def _submit_prepared(self, requests: list[Request], link: "_Link") -> None:
        errors = await asyncio.to_thread(self._prepared, requests)
        for request, error in zip(requests, errors, strict=True):
            self._preparing.discard(request.id)
            if request.id not in self._links:  # it was cancelled meanwhile
                continue
            if error is None:
                self._loop.submit(request)
            else:
                del self._links[request.id]
                link.put([Failed(request.id, error)])

    def _prepared(self, requests: list[Request]) -> list[Exception | None]:
        """What became of each."""
        errors: list[Exception | None] = []
        for request in requests:
            try:
                self._engine.prepare(request)
                errors.append(None)
            except Exception as error:
                if not isinstance(error, RequestError):
                    log.exception("preparing a request")
                errors.append(error)
        return errors

    def _cancel(self, request_id: str, index: int | None) -> None:
        if request_id in self._preparing:
            self._links.pop(request_id, None)
        else:
            self._loop.cancel(request_id, index)

    def _from_engine(self, news: News) -> None:
        with suppress(RuntimeError):  # the event loop is closing
            self._events.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: News) -> None:
        by_link: dict[_Link, News] = {}
        for item in news:
            link = self._links.get(item.request_id)
            if link is None:
                continue
            by_link.setdefault(link, []).append(item)
            if isinstance(item, Failed) or item.usage is not None:
                del self._links[item.request_id]
        for link, items in by_link.items():
            link.put(items)

    def _load(self) -> wire.Load:
        load: Load = self._engine.load()
        return wire.Load(
            slots=load.slots,
            running=load.running,
            waiting=load.waiting,
            queue=min(load.queue, (1 << 32) - 1),
            draining=self._engine.draining,
            crowd=load.crowd,
            crowd_waiting=load.crowd_waiting,
        )


class _Link:
    """One gateway's stream: what it has not taken yet, merged by sequence."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[str, int], Output] = {}
        self._failures: list[Failed] = []
        self._some = asyncio.Event()

    def put(self, news: News) -> None:
        for item in news:
            if isinstance(item, Failed):
                self._failures.append(item)
            elif (known := self._outputs.get((item.request_id, item.index))) is None:
                self._outputs[item.request_id, item.index] = item
            else:
                known.extend(item)
        self._some.set()

    async def take(self, timeout_s: float) -> wire.Events:
        """All news, as soon as there is some; nothing after the timeout."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._some.wait(), timeout_s)
        self._some.clear()
        outputs, self._outputs = self._outputs, {}
        failures, self._failures = self._failures, []
        return wire.Events(
            tokens=[tokens_from(o) for o in outputs.values()], failures=[failure(f) for f in failures]
        )
