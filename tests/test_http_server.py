"""What surrounds the work: status routes, the key, request ids, unknown routes, metrics, tokens."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from dape_engine.request import RequestStats, RequestTimes, StepStats
from dape_server.app import create_app
from dape_server.metrics import Metrics
from dape_server.settings import ServerSettings
from fakes import FakeEngine, events, serving


@pytest.fixture
def client():
    with serving() as client:
        yield client


def samples(client):
    """Return the metrics as {name: value}, labelled ones as {(name, label values...): value}."""
    text = client.get("/metrics").text
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine"))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class TestStatus:
    def test_all_is_well(self, client):
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").status_code == 200
        versions = client.get("/version").json()
        assert versions.keys() >= {"version", "model", "attention_backend", "instruction_set", "python"}

    def test_starting_and_draining_take_no_work_but_live(self, client):
        lifecycle = client.app.state.context.lifecycle
        lifecycle.drain()
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["error"]["code"] == "draining"
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200
        for path in ("/v1/completions", "/v1/perplexity", "/tokenize", "/detokenize"):
            answer = client.post(path, json={"prompt": "the"})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert "draining" in answer.json()["error"]["message"]

    def test_not_ready_before_the_engine_has_started(self):
        # Without a `with` the client does not run the application's start.
        client = TestClient(create_app(FakeEngine(), ServerSettings()))
        assert client.get("/ready").json()["error"]["code"] == "starting"
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "the"}).status_code == 503

    @pytest.mark.parametrize(
        "trouble",
        [
            {"failure": "the engine has failed: RuntimeError"},
            {"stopped": True},
            {"seconds_since_progress": 61.0},
        ],
    )
    def test_dead_or_stuck_engine_is_seen(self, client, trouble):
        for name, value in trouble.items():
            setattr(client.engine, name, value)
        for path in ("/health", "/ready"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "unhealthy"

    def test_slow_step_within_the_limit_is_healthy(self, client):
        client.engine.seconds_since_progress = 59.0
        assert client.get("/health").status_code == 200


class TestModels:
    def test_list_and_single(self, client):
        (model,) = client.get("/v1/models").json()["data"]
        assert model == client.get("/v1/models/fake").json()
        assert model["id"] == "fake"
        assert model["object"] == "model"
        assert model["max_model_len"] == 64
        assert model["train_length"] == 16

    def test_unknown(self, client):
        answer = client.get("/v1/models/other/name")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"

    def test_served_name_replaces_the_folders(self):
        with serving(served_model_name="mine") as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
            body = {"prompt": "the", "max_tokens": 1}
            assert client.post("/v1/completions", json={**body, "model": "mine"}).json()["model"] == "mine"
            assert client.post("/v1/completions", json={**body, "model": "fake"}).status_code == 404
            assert client.post("/tokenize", json={"prompt": "the", "model": "fake"}).status_code == 404


class TestTokens:
    def test_there_and_back(self, client):
        answer = client.post("/tokenize", json={"prompt": "the cat🙂", "return_token_strs": True}).json()
        assert answer["count"] == len(answer["tokens"]) == 6
        assert answer["max_model_len"] == 64
        assert answer["token_strs"][:2] == ["the", " cat"]
        back = client.post("/detokenize", json={"tokens": answer["tokens"]})
        assert back.json() == {"prompt": "the cat🙂"}

    def test_token_strings_only_when_asked(self, client):
        assert "token_strs" not in client.post("/tokenize", json={"prompt": "the"}).json()

    def test_special_tokens_by_the_tokenizers_rule(self):
        with serving(FakeEngine(adds_bos=True)) as client:
            assert client.post("/tokenize", json={"prompt": "the"}).json()["tokens"] == [1, 259]
            body = {"prompt": "the", "add_special_tokens": False}
            assert client.post("/tokenize", json=body).json()["tokens"] == [259]

    def test_what_evaluation_harnesses_ask(self, client):
        info = client.get("/tokenizer_info").json()
        assert info["eos_token"] == "<|endoftext|>"
        assert info["bos_token"] == "<s>"
        assert info["pad_token"] is None
        assert info["chat_template"] is None

    def test_nothing_is_something(self, client):
        assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
        assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


class TestUnknown:
    @pytest.mark.parametrize("path", ["/v1/completions/", "/v1/responses", "/v1"])
    def test_route(self, client, path):
        for answer in (client.get(path), client.post(path, json={})):
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "not_found"

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"])
    def test_method(self, client, method):
        answer = client.request(method, "/v1/completions")
        assert answer.status_code == 405
        assert answer.headers["allow"] == "POST"
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "method_not_allowed"


class TestKey:
    @pytest.fixture
    def client(self):
        with serving(api_key=("first-key", "zweiter-schlüssel")) as client:
            yield client

    ROUTES = (
        "/ready",
        "/version",
        "/metrics",
        "/v1/models",
        "/tokenizer_info",
        "/openapi.json",
        "/docs",
        "/no",
    )

    @pytest.mark.parametrize(
        "header",
        [
            *(None, "", "Bearer", "Bearer ", "Bearer wrong", "first-key", "Basic first-key"),
            *("Bearer first-keyx", "Bearer first-ke", "Bearer first-key second"),
            *(b"Bearer \xff\xfe", "Bearer " + "x" * 10_000),
        ],
    )
    def test_refused_without_a_key(self, client, header):
        headers = {} if header is None else {"Authorization": header}
        for route in self.ROUTES:
            assert client.get(route, headers=headers).status_code == 401
        answer = client.post("/v1/completions", json={"prompt": "the"}, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "first-key" not in answer.text
        assert client.engine.requests == []

    def test_health_is_open(self, client):
        assert client.get("/health").status_code == 200
        assert client.get("/health", headers={"Authorization": "Bearer "}).status_code == 200

    @pytest.mark.parametrize("key", ["first-key", "zweiter-schlüssel"])
    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    def test_served_with_any_key(self, client, scheme, key):
        headers = {"Authorization": f"{scheme} {key}".encode()}
        assert client.get("/v1/models", headers=headers).status_code == 200
        answer = client.post("/v1/completions", json={"prompt": "the", "max_tokens": 1}, headers=headers)
        assert answer.status_code == 200

    def test_keys_do_not_show(self):
        assert "first-key" not in repr(ServerSettings(api_key=("first-key",)))

    def test_empty_key_is_no_key(self):
        with pytest.raises(ValueError, match="at least 1"):
            ServerSettings(api_key=("",))

    def test_big_body_is_not_read_without_a_key(self):
        with serving(api_key=("k",), max_body_size=1024) as client:
            assert client.post("/v1/completions", content=b"x" * 4096).status_code == 401


class TestRequestId:
    @pytest.mark.parametrize("given", ["abc", "a-b_c.d:9", "x" * 128])
    def test_sane_id_comes_back(self, client, given):
        for path in ("/health", "/nowhere"):
            assert client.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] == given

    @pytest.mark.parametrize(
        "given", ["", "x" * 129, "x" * 100_000, "a b", "<script>", "a;b", b"\xe9", "a%0ab"]
    )
    def test_other_ids_are_replaced(self, client, given):
        answer = client.get("/health", headers={"X-Request-Id": given})
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])

    def test_same_id_twice_is_no_clash_in_the_engine(self, client):
        body = {"prompt": "the", "max_tokens": 1}
        for _ in range(2):
            client.post("/v1/completions", json=body, headers={"X-Request-Id": "same"})
        first, second = client.engine.requests
        assert first.request_id != second.request_id


class TestMetrics:
    def test_gauges_follow_the_engine(self, client):
        client.engine.active["somebody"] = 64
        found = samples(client)
        assert found["dape:num_requests_running",] == 1
        assert found["dape:num_requests_waiting",] == 0
        assert found["dape:kv_cache_free_blocks",] == 192
        assert found["dape:kv_cache_total_blocks",] == 256
        assert found["dape:kv_cache_usage_perc",] == 0.25
        assert found["dape:engine_healthy",] == 1

    def test_steps_and_requests_are_counted(self):
        metrics = Metrics("m")
        metrics.on_step(StepStats(0.1, 30, 20, 4, 6, 1, 100, 60, (0.0007, 0.003)))
        times = RequestTimes(queued=10.0, scheduled=10.5, first_token=11.0, finished=13.0)
        metrics.on_finished(RequestStats("generate", "length", 20, 5, 0, 16, 1, 8, times))
        metrics.on_finished(
            RequestStats("score", "abort", 9, 0, 8, 0, 0, 0, RequestTimes(queued=1.0, finished=2.0))
        )
        with serving(metrics=metrics) as client:
            found = samples(client)
        expected = {
            "dape:prompt_tokens_total": 20,
            "dape:generation_tokens_total": 4,
            "dape:scored_tokens_total": 6,
            "dape:num_preemptions_total": 1,
            "dape:prefix_cache_queries_total": 100,
            "dape:prefix_cache_hits_total": 60,
            "dape:iteration_tokens_total_sum": 30,
            "dape:inter_token_latency_seconds_count": 2,
            "dape:time_to_first_token_seconds_sum": 1.0,
            "dape:e2e_request_latency_seconds_sum": 4.0,
            "dape:e2e_request_latency_seconds_count": 2,
            "dape:request_queue_time_seconds_sum": 0.5,
            "dape:request_prefill_time_seconds_sum": 0.5,
            "dape:request_decode_time_seconds_sum": 2.0,
            "dape:request_inference_time_seconds_sum": 2.5,
            "dape:request_time_per_output_token_seconds_sum": 0.5,
            "dape:request_prompt_tokens_sum": 29,
            "dape:request_generation_tokens_sum": 5,
            "dape:request_params_max_tokens_sum": 8,
            "dape:request_num_preemptions_sum": 1,
        }
        assert {name: found[name,] for name in expected} == expected
        assert found["dape:request_success_total", "length"] == 1
        assert found["dape:request_success_total", "abort"] == 1
        assert found["dape:inter_token_latency_seconds_bucket", "0.001"] == 1

    def test_labels_name_the_model(self, client):
        assert 'dape:num_requests_running{engine="0",model_name="fake"} 0.0' in client.get("/metrics").text

    def test_clients_cannot_add_series(self, client):
        client.get("/nowhere/at/all")
        client.get("/v1/models/fake")
        client.get("/v1/models/other")
        client.request("BREW", "/health")
        client.post("/v1/completions", json={"prompt": "the", "n": 3, "max_tokens": 1})
        client.post("/v1/completions", json={"prompt": 5})
        found = samples(client)
        counted = {key[1:] for key in found if key[0] == "http_requests_total"}
        assert counted == {
            ("other", "GET", "404"),
            ("/v1/models/{name:path}", "GET", "200"),
            ("/v1/models/{name:path}", "GET", "404"),
            ("/health", "other", "405"),
            ("/v1/completions", "POST", "200"),
            ("/v1/completions", "POST", "400"),
        }
        assert found["dape:request_params_n_sum",] == 3

    def test_two_servers_share_nothing(self, client):
        with serving() as other:
            client.get("/version")
            assert ("http_requests_total", "/version", "GET", "200") not in samples(other)


def test_schema_describes_bodies_and_errors(client):
    schema = client.get("/openapi.json").json()
    operation = schema["paths"]["/v1/completions"]["post"]
    for part, name in (
        (operation["requestBody"], "CompletionRequest"),
        (operation["responses"]["200"], "Completion"),
        (operation["responses"]["400"], "ErrorResponse"),
    ):
        assert part["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
    assert operation["responses"]["429"]
    properties = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {option["type"] for option in properties["prompt"]["anyOf"]} == {"string", "array"}


def test_stream_is_not_cached_on_the_way(client):
    answer = client.post("/v1/completions", json={"prompt": "the", "max_tokens": 1, "stream": True})
    assert answer.headers["cache-control"] == "no-cache"
    assert len(events(answer.text)) == 1
