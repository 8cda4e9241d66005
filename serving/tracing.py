"""OpenTelemetry's traces: a span for each request, and within it where the time went. The packages are optional.

The spans are made when a request has ended, from times that are taken anyhow, so nothing is done for each token.
"""

import time
from typing import Any

from serving.config import TracingSpec
from serving.errors import ServeConfigError
from serving.gateway.requests import Record
from serving.logs import outcome

OPERATIONS = {
    "generate": "text_completion",
    "score": "text_completion",
    "embed": "embeddings",
}  # OpenTelemetry's names
NS = 1_000_000_000


class Tracing:
    """A listener of `Requests` that exports over OTLP."""

    def __init__(self, spec: TracingSpec):
        """Raises ServeConfigError where the packages are not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ServeConfigError(f"gateway.tracing: {error}; pip install 'fathom-serve[otel]'") from None
        insecure = not spec.endpoint.startswith("https://")
        exporter = OTLPSpanExporter(endpoint=spec.endpoint, insecure=insecure)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": spec.service_name}),
            sampler=ParentBasedTraceIdRatio(spec.sample),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fathom")
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: Record) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        ended = time.time_ns()
        span = self._tracer.start_span(
            f"{record.method} {record.model}".strip(),
            context=self._propagator.extract({"traceparent": record.traceparent}),
            kind=SpanKind.SERVER,
            start_time=record.started,
        )
        if span.is_recording():
            span.set_attributes(_attributes(record))
            if outcome(record) == "failed":
                span.set_status(Status(StatusCode.ERROR, str(record.error)))
            inside = set_span_in_context(span)
            for name, start, end in _phases(record, ended):
                self._tracer.start_span(name, context=inside, start_time=start).end(end)
        span.end(ended)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


def _phases(record: Record, ended: int) -> list[tuple[str, int, int]]:
    """Name, start and end of what a request went through, in nanoseconds since 1970."""
    if not record.sent:
        return []
    phases = [("gateway", record.started, record.sent)]
    if record.usage is not None:
        at = record.sent
        for name in ("queue", "prefill", "decode"):
            end = min(ended, at + int(getattr(record.usage, f"{name}_s") * NS))
            phases.append((name, at, end))
            at = end
    return phases


def _attributes(record: Record) -> dict[str, Any]:
    """In OpenTelemetry's semantic conventions for generative models, and ours beyond them."""
    told: dict[str, Any] = {
        "gen_ai.operation.name": OPERATIONS[record.method],
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "fathom.request_id": record.request_id,
        "fathom.replica": record.replica,
        "fathom.outcome": outcome(record),
    }
    if record.finish_reason is not None:
        told["gen_ai.response.finish_reasons"] = [str(record.finish_reason)]
    if record.error is not None:
        told["error.type"] = type(record.error).__name__
    if record.usage is not None:
        told["gen_ai.usage.output_tokens"] = record.usage.completion_tokens
        for name in ("mean_depth", "flops_saved", "cached_tokens", "cache_miss_reason"):
            told[f"fathom.{name}"] = getattr(record.usage, name)
    return told
