"""Spans of requests: where they belong, what they say, and what they must not say."""

from __future__ import annotations

import gzip
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

import dape_server.tracing
from dape_engine.engine import AsyncEngine
from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_server.app import create_app
from dape_server.metrics import Metrics
from dape_server.settings import ServerSettings
from fakes import CANARY, COMPLETIONS, PERPLEXITY, FakeEngine
from models import write_model

ENDPOINT = "http://localhost:4318/v1/traces"
TRACE, PARENT = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
HEADERS = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01", "X-Request-Id": "mine"}


@pytest.fixture
def exporter(monkeypatch):
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(dape_server.tracing, "to_collector", lambda _: SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def client(exporter, tmp_path):
    exporter.clear()
    metrics = Metrics("tiny")
    options = EngineOptions(kv_cache_memory="1MiB", device="cpu")
    engine = AsyncEngine(write_model(tmp_path / "tiny"), options, metrics)
    app = create_app(engine, ServerSettings(otlp_endpoint=ENDPOINT), metrics)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def spans_of(client, exporter):
    """Return the spans by name once the engine has told all of them."""
    # The engine's thread reports a request after it has given the last token away.
    client.__exit__()
    return {span.name: span for span in exporter.get_finished_spans()}


def test_one_completion(client, exporter):
    body = {"prompt": CANARY, "max_tokens": 4, "ignore_eos": True}
    answer = client.post(COMPLETIONS, json=body, headers=HEADERS)
    assert answer.status_code == 200
    usage = answer.json()["usage"]
    spans = spans_of(client, exporter)
    assert spans.keys() == {f"POST {COMPLETIONS}", "generate", "queue", "prefill", "decode"}
    whole, engine = spans[f"POST {COMPLETIONS}"], spans["generate"]
    assert whole.kind is SpanKind.SERVER
    assert (whole.context.trace_id, whole.parent.span_id) == (TRACE, PARENT)
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["http.route"] == COMPLETIONS
    assert whole.attributes["dape.request_id"] == "mine"
    assert whole.status.status_code is StatusCode.UNSET
    assert engine.parent.span_id == whole.context.span_id
    assert engine.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert engine.attributes["gen_ai.usage.output_tokens"] == 4
    assert engine.attributes["gen_ai.request.max_tokens"] == 4
    assert engine.attributes["gen_ai.request.model"] == "tiny"
    assert engine.attributes["gen_ai.response.finish_reasons"] == ("length",)
    stages = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(stage.parent.span_id == engine.context.span_id for stage in stages)
    assert stages[0].start_time == engine.start_time
    assert stages[0].end_time == stages[1].start_time
    assert stages[1].end_time == stages[2].start_time
    assert stages[2].end_time == engine.end_time
    assert whole.start_time <= engine.start_time
    assert CANARY not in "".join(span.to_json() for span in spans.values())


def test_each_completion_of_a_request_has_its_span(client, exporter):
    client.post(COMPLETIONS, json={"prompt": "It was", "max_tokens": 2, "n": 3, "stream": True})
    client.__exit__()
    spans = exporter.get_finished_spans()
    (whole,) = [span for span in spans if span.kind is SpanKind.SERVER]
    assert whole.parent is None
    children = [span for span in spans if span.name == "generate"]
    assert [span.parent.span_id for span in children] == [whole.context.span_id] * 3


def test_scoring_has_no_decode(client, exporter):
    client.post(PERPLEXITY, json={"input": "It was the best of times"})
    spans = spans_of(client, exporter)
    assert spans.keys() == {f"POST {PERPLEXITY}", "score", "queue", "prefill"}
    assert spans["score"].attributes["dape.usage.scored_tokens"] > 0
    assert spans["score"].attributes["gen_ai.operation.name"] == "score"


def test_refusal_and_defect(exporter):
    engine = FakeEngine()
    app = create_app(engine, ServerSettings(otlp_endpoint=ENDPOINT))
    with TestClient(app, raise_server_exceptions=False) as client:
        client.post(COMPLETIONS, json={"prompt": CANARY, "n": 0})
        engine.fails_with = RuntimeError(CANARY)
        client.post(COMPLETIONS, json={"prompt": CANARY})
    refused, failed = exporter.get_finished_spans()
    assert refused.attributes["error.type"] == "invalid_value"
    assert refused.status.status_code is StatusCode.UNSET
    assert failed.attributes["error.type"] == "internal_error"
    assert failed.status.status_code is StatusCode.ERROR
    assert CANARY not in refused.to_json() + failed.to_json()


class Collector(BaseHTTPRequestHandler):
    """Takes what is posted and keeps it on its server."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.taken.append((self.path, gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_spans_reach_a_collector_by_the_end():
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        collector.taken = []
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with TestClient(create_app(FakeEngine(), ServerSettings(otlp_endpoint=endpoint))) as client:
            client.post(COMPLETIONS, json={"prompt": CANARY}, headers=HEADERS)
        collector.shutdown()
    ((path, body),) = collector.taken
    assert path == "/v1/traces"
    (whole,) = ExportTraceServiceRequest.FromString(body).resource_spans
    (span,) = whole.scope_spans[0].spans
    assert span.name == f"POST {COMPLETIONS}"
    assert int.from_bytes(span.trace_id) == TRACE
    assert CANARY.encode() not in body


def test_missing_package_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "dape_server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"--otlp-endpoint .* pip install 'dape-serve\[otel\]'"):
        create_app(FakeEngine(), ServerSettings(otlp_endpoint=ENDPOINT))


def test_nothing_is_imported_without_an_endpoint(monkeypatch):
    monkeypatch.delitem(sys.modules, "dape_server.tracing")
    create_app(FakeEngine(), ServerSettings())
    assert "dape_server.tracing" not in sys.modules
