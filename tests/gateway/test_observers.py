"""Traces and structured logs of real requests: a collector of our own hears what is exported."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from serving.config import GatewaySpec, LogSpec, TracingSpec
from serving.errors import ServeConfigError
from serving.gateway.http import make_app
from serving.gateway.requests import Requests
from serving.logs import ROOT, set_up
from serving.observers import Observers
from tests import tiny
from tests.gateway.harness import House, house
from tests.gateway.ingress import http_port, patient  # noqa: F401  (used by being here)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    logger = logging.getLogger(ROOT)
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@asynccontextmanager
async def observed(folder: Path, **spec: Any) -> AsyncIterator[tuple[House, Observers, httpx.AsyncClient]]:
    options = GatewaySpec(**spec)
    observers = Observers(options)
    async with house(folder) as h:
        h.requests = Requests(h.fleet, options, observers.listeners)
        async with (
            http_port(make_app(h.requests, h.fleet, options, h.metrics)) as url,
            httpx.AsyncClient(base_url=url, timeout=20) as client,
        ):
            yield h, observers, client


@asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, list[Any]]]:
    """An OTLP collector: its address, and the spans that it hears of."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    spans: list[Any] = []

    class Collector(service.TraceServiceServicer):  # type: ignore[name-defined]
        async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            return messages.ExportTraceServiceResponse()

    server = grpc.aio.server()
    service.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"http://127.0.0.1:{port}", spans
    finally:
        await server.stop(None)


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


async def test_a_request_is_a_span_of_its_callers_trace_with_its_phases_inside(folder: Path) -> None:
    async with collector() as (endpoint, spans):
        async with observed(folder, tracing=TracingSpec(endpoint=endpoint)) as (_, observers, client):
            body = {"prompt": "def f", "max_tokens": 5, "ignore_eos": True}
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
            wrong = await client.post("/v1/completions", json={**body, "prompt": [999]}, headers=headers)
            assert wrong.status_code == 400
            await asyncio.to_thread(observers.close)
        assert {span.trace_id.hex() for span in spans} == {TRACE}
        whole, failed = sorted(
            (s for s in spans if s.parent_span_id.hex() == PARENT), key=lambda s: s.start_time_unix_nano
        )
        assert whole.name == "generate tiny"
        told = attributes(whole)
        assert told["gen_ai.usage.output_tokens"] == 5 and told["gen_ai.request.model"] == "tiny"
        assert told["fathom.outcome"] == "ok" and told["fathom.mean_depth"] == 1
        parts = [span for span in spans if span.parent_span_id == whole.span_id]
        assert [span.name for span in parts] == ["gateway", "queue", "prefill", "decode"]
        times = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in parts]
        assert times[0][0] == whole.start_time_unix_nano and times[-1][1] <= whole.end_time_unix_nano
        assert all(end == start for (_, end), (start, _) in pairwise(times))
        assert attributes(failed)["error.type"] == "InvalidArgumentError" and "999" in failed.status.message


async def test_callers_that_do_not_trace_are_not_traced(folder: Path) -> None:
    async with collector() as (endpoint, spans):
        async with observed(folder, tracing=TracingSpec(endpoint=endpoint)) as (_, observers, client):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
            await client.post("/v1/embeddings", json={"input": "a"}, headers=headers)
            await asyncio.to_thread(observers.close)
        assert not spans


async def test_every_request_is_a_line_of_json_with_its_id(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "gateway.log"
    async with observed(folder, logs=LogSpec(file=str(file))) as (h, _, client):
        for body in ({"prompt": "secret words", "max_tokens": 5, "ignore_eos": True}, {"prompt": [999]}):
            await client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        async with client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": "a", "max_tokens": 9999, "ignore_eos": True, "stream": True},
        ) as answer:
            await anext(answer.aiter_lines())
        await h.idle()
    text = file.read_text()
    good, bad, gone = [
        told for told in map(json.loads, text.splitlines()) if told["logger"] == "fathom.requests"
    ]
    assert good["message"] == "generate ok" and good["request_id"].startswith("mine.")
    assert (good["completion_tokens"], good["finish_reason"], good["replica"]) == (5, "length", "r0")
    assert bad["message"] == "generate failed" and bad["error"] == "InvalidArgumentError"
    assert bad["request_id"].startswith("mine.") and "999" in bad["detail"]
    assert gone["message"] == "generate cancelled"
    assert "secret" not in text, "what people write is not logged"


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match=r"gateway\.logs\.file = .*no/such"):
        set_up(LogSpec(file=str(tmp_path / "no" / "such")))
    with pytest.raises(ValueError, match="endpoint"):
        TracingSpec(endpoint="localhost:4317")


def test_errors_are_logged_with_where_they_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(LogSpec())
    try:
        raise KeyError("lost")
    except KeyError:
        logging.getLogger("fathom.gateway").exception("reading %s", "r0", extra={"request_id": "7"})
    told = json.loads(capsys.readouterr().err)
    assert told["message"] == "reading r0" and told["request_id"] == "7" and told["level"] == "error"
    assert "KeyError" in told["exception"] and told["time"].endswith("+00:00")
