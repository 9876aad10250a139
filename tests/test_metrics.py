"""What is counted, and under which names."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dape_engine.request import RequestStats, RequestTimes, StepStats
from dape_server.metrics import BODY_BYTES, INTER_TOKEN_SECONDS, Metrics
from fakes import COMPLETIONS, FakeEngine, serving

VLLM = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "engine_healthy",
    "prompt_tokens",
    "generation_tokens",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "iteration_tokens_total",
    "request_num_preemptions",
    "request_prefill_kv_computed_tokens",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
]
"""Names that dashboards made for vLLM ask for, after its prefix."""


@pytest.fixture
def client():
    with serving() as client:
        yield client


def test_clients_make_no_series_of_their_own(client):
    """Names that clients choose become no labels: each would be a series that nobody ever removes."""

    def series():
        samples = (sample for family in families(client).values() for sample in family.samples)
        return {(sample.name, *sorted(sample.labels.items())) for sample in samples}

    def ask(name):
        body = {"prompt": "the", "max_tokens": 1, "user": name, "request_id": name, "cache_salt": name}
        client.post(COMPLETIONS, json=body, headers={"User-Agent": name, "X-Request-Id": name})
        client.post(COMPLETIONS, json={**body, "model": name})
        client.get(f"/{name}")
        client.request(name.upper(), "/health")

    ask("first")
    series()  # the first look makes the series of its own route
    before = series()
    for number in range(5):
        ask(f"other-{number}")
    assert series() == before


def families(client):
    return {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}


def value(client, name, **labels):
    """Return the one sample of a name with these labels; 0 where there is none yet."""
    found = [
        sample.value
        for family in families(client).values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) <= 1, name
    return found[0] if found else 0


def test_vllms_names_are_there(client):
    found = families(client)
    assert [name for name in VLLM if f"dape:{name}" not in found] == []


def test_cache_is_described(client):
    labels = {"block_size": "4", "num_blocks": "256", "model_name": "fake"}
    assert value(client, "dape:cache_config_info", **labels) == 1


def test_gauges_of_queue_and_health(client):
    assert value(client, "dape:num_tokens_waiting") == 0
    assert value(client, "dape:engine_healthy") == 1
    client.engine.seconds_since_progress = 7.5
    assert value(client, "dape:engine_seconds_since_progress") == 7.5
    client.engine.failure = "the engine has failed"
    assert value(client, "dape:engine_healthy") == 0


def test_steps_tell_the_busy_time():
    metrics = Metrics("m")
    for seconds in (0.25, 0.5):
        metrics.on_step(StepStats(seconds, 30, 20, 4, 6, 1, 100, 60, (0.0007,)))
    with serving(metrics=metrics) as client:
        assert value(client, "dape:engine_step_seconds_sum") == 0.75
        assert value(client, "dape:engine_step_seconds_count") == 2
    totals = metrics.totals
    assert (totals.steps, totals.prompt, totals.generated, totals.scored) == (2, 40, 8, 12)
    assert (totals.prefix_queries, totals.prefix_hits) == (200, 120)


def test_computed_tokens_are_those_that_were_not_cached():
    metrics = Metrics("m")
    times = RequestTimes(queued=1.0, finished=2.0)
    metrics.on_finished(RequestStats("generate", "stop", 20, 5, 0, 16, 0, 8, times))
    with serving(metrics=metrics) as client:
        assert value(client, "dape:request_prefill_kv_computed_tokens_sum") == 4
        assert value(client, "dape:request_max_num_generation_tokens_sum") == 5


def test_bytes_of_bodies(client):
    body = b'{"prompt": "the", "max_tokens": 2}'
    answer = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    labels = {"handler": COMPLETIONS}
    assert value(client, "http_request_size_bytes_sum", **labels) == len(body)
    assert value(client, "http_response_size_bytes_sum", **labels) == len(answer.content)


@pytest.mark.parametrize(
    ("body", "settings", "code"),
    [
        ({"prompt": "the", "n": 0}, {}, "invalid_value"),
        ({"prompt": "the", "swordfish": 0}, {}, "unknown_field"),
        ({"prompt": "the", "model": "swordfish"}, {}, "model_not_found"),
        ({"prompt": "the"}, {"api_key": ("k",)}, "invalid_api_key"),
    ],
)
def test_errors_are_counted_by_code(body, settings, code):
    metrics = Metrics("m")
    with serving(metrics=metrics, **settings) as client:
        client.post(COMPLETIONS, json=body)
    text = metrics.exposition().decode()
    assert re.findall(r'dape:request_errors_total{code="(\w+)".*} (\S+)', text) == [(code, "1.0")]
    assert "swordfish" not in text


def test_full_queue_is_counted():
    with serving(FakeEngine(max_num_queued_reqs=0)) as client:
        assert client.post(COMPLETIONS, json={"prompt": "the"}).status_code == 429
        assert value(client, "dape:request_errors_total", code="queue_full") == 1


def test_errors_within_a_stream_are_counted():
    class Breaks(FakeEngine):
        async def _step(self):
            await super()._step()
            if self.steps > 1:
                raise ValueError

    with serving(Breaks()) as client:
        client.post(COMPLETIONS, json={"prompt": "the", "stream": True})
        assert value(client, "dape:request_errors_total", code="internal_error") == 1
        assert value(client, "http_requests_total", handler=COMPLETIONS, status="200") == 1


def test_requests_without_error_count_none(client):
    client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": 1})
    client.get("/ready")
    assert [s for s in families(client)["dape:request_errors"].samples if s.name.endswith("_total")] == []


def test_buckets_suit_small_models():
    assert INTER_TOKEN_SECONDS[0] == 0.0005
    assert list(INTER_TOKEN_SECONDS) == sorted(INTER_TOKEN_SECONDS)
    assert list(BODY_BYTES) == sorted(BODY_BYTES)
