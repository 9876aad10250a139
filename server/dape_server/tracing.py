"""OpenTelemetry spans: one per HTTP request, and below it what the engine did for it.

Spans hold counts and times, never text. A W3C `traceparent` of the client makes its request part of the
client's trace. What is imported here comes with the package's extra `otel`; without an endpoint the
server does not import this module.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dape_engine.request import RequestStats
from dape_server.metrics import Exchange

EXPORT_SECONDS: Final = 5
"""Longest wait for the collector to take spans."""
OPERATIONS: Final = {"generate": "text_completion", "score": "score"}
Attributes = dict[str, str | int | float | list[str]]


class Tracing:
    """Makes spans and sends them, in the background, to where `processor` says.

    Args:
        model_name: of the served model.
        processor: takes finished spans; see `to_collector`.
    """

    def __init__(self, model_name: str, processor: SpanProcessor):
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "dape-serve"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("dape_server")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Iterator[Span]:
        """Serve a request within a span, which the engine's spans find as the current one."""
        parent = self._propagator.extract(headers)
        with self._tracer.start_as_current_span(
            # Only the end tells which route it was.
            "HTTP",
            context=parent,
            kind=SpanKind.SERVER,
            # A message could hold a value of the request.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    def describe(self, span: Span, exchange: Exchange, request_id: str) -> None:
        """Note on the span of an HTTP request how it went."""
        span.update_name(f"{exchange.method} {exchange.route}")
        span.set_attributes(
            {
                "http.request.method": exchange.method,
                "http.route": exchange.route,
                "http.response.status_code": exchange.status,
                "http.request.body.size": exchange.received,
                "http.response.body.size": exchange.sent,
                "dape.request_id": request_id,
            }
        )
        if exchange.error is not None:
            span.set_attribute("error.type", exchange.error)
        if exchange.status >= 500:
            span.set_status(StatusCode.ERROR)

    def on_finished(self, stats: RequestStats) -> None:
        """Add what the engine did for one request; called in that request's context."""
        times = stats.times
        end = time.monotonic() if times.finished is None else times.finished
        # Spans have wall-clock times, the engine's are of the monotonic clock.
        shift = time.time() - time.monotonic()
        counts: Attributes = {
            "gen_ai.operation.name": OPERATIONS[stats.kind],
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.finish_reasons": [stats.finish_reason],
            "gen_ai.usage.input_tokens": stats.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": stats.num_cached_tokens,
            "gen_ai.usage.output_tokens": stats.num_generated_tokens,
            "dape.usage.scored_tokens": stats.num_scored_tokens,
            "dape.num_preemptions": stats.num_preemptions,
        }
        if stats.kind == "generate":
            counts["gen_ai.request.max_tokens"] = stats.max_tokens
        whole = self._add(stats.kind, get_current_span(), times.queued + shift, end + shift, counts)
        stages = {
            "queue": (times.queued, times.scheduled or end),
            "prefill": (times.scheduled, times.first_token or end),
            "decode": (times.first_token, end),
        }
        for name, (begin, until) in stages.items():
            if begin is not None:
                self._add(name, whole, begin + shift, until + shift, {})

    def _add(self, name: str, parent: Span, begin: float, end: float, attributes: Attributes) -> Span:
        """Record a span that has already ended, from `begin` to `end` in Unix seconds."""
        span = self._tracer.start_span(
            name,
            context=set_span_in_context(parent),
            attributes=attributes,
            start_time=_nanoseconds(begin),
        )
        span.end(_nanoseconds(end))
        return span

    def shutdown(self) -> None:
        """Send what is left; waits for the collector."""
        self._provider.shutdown()


def to_collector(endpoint: str) -> SpanProcessor:
    """Return a processor that sends spans by OTLP over HTTP to a URL such as http://host:4318/v1/traces."""
    return BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
