"""POST /v1/completions: what vLLM and llama.cpp have beyond OpenAI, and what is refused by name."""

from __future__ import annotations

import pytest

from fakes import BOS, CANARY, COMPLETIONS, FakeEngine, check_refused, events, logprob, serving

THE, CAT = 259, 264


@pytest.fixture
def client():
    with serving() as client:
        yield client


def complete(client, **body):
    answer = client.post(COMPLETIONS, json={"prompt": [THE, CAT], "max_tokens": 4, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def stream(client, **body):
    body = {"prompt": [THE, CAT], "max_tokens": 4, "stream": True, **body}
    answer = client.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    return events(answer.text)


class TestRefusedByName:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("use_beam_search", True),
            ("length_penalty", 1.1),
            ("early_stopping", True),
            ("spaces_between_special_tokens", True),
            ("thinking_token_budget", 5),
            ("repetition_detection", {}),
            ("logits_processors", []),
            ("session_id", "s"),
            ("kv_transfer_params", {}),
            ("vllm_xargs", {}),
            ("timings_per_token", True),
            ("suffix", "end"),
        ],
    )
    def test_with_a_reason(self, client, field, value):
        body = {"prompt": CANARY, field: value}
        says = f"{field}: is not supported: "
        check_refused(client, COMPLETIONS, body, field, code="unsupported_parameter", says=says)

    def test_switched_off_they_are_taken(self, client):
        off = {
            "use_beam_search": False,
            "length_penalty": 1.0,
            "early_stopping": False,
            "spaces_between_special_tokens": False,
            "thinking_token_budget": None,
            "repetition_detection": None,
            "session_id": None,
            "timings_per_token": False,
            "suffix": "",
            "guided_json": None,
        }
        assert complete(client, **off) == complete(client)

    def test_one_is_not_true(self, client):
        check_refused(client, COMPLETIONS, {"prompt": CANARY, "length_penalty": True}, "length_penalty")

    @pytest.mark.parametrize(
        ("extra", "param"),
        [
            ({"stream_interval": 2}, "stream_interval"),
            ({"stream_interval": 0, "stream": True}, "stream_interval"),
            ({"return_progress": True}, "return_progress"),
            ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
            ({"prompt_logprobs": -1}, "prompt_logprobs"),
            ({"prompt_logprobs": 21}, "prompt_logprobs"),
            ({"logprobs": -1}, "logprobs"),
            ({"logprob_token_ids": [5] * 129}, "logprob_token_ids"),
            ({"logprob_token_ids": [10_000]}, "logprob_token_ids"),
            ({"allowed_token_ids": []}, "allowed_token_ids"),
            ({"allowed_token_ids": [10_000]}, "allowed_token_ids"),
            ({"bad_words": ["x"] * 65}, "bad_words"),
            ({"bad_words": [""]}, "bad_words"),
            ({"bad_words": "word"}, "bad_words"),
            ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
            ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
            ({"truncation_side": "left"}, "truncation_side"),
            ({"truncation_side": "top", "truncate_prompt_tokens": 5}, "truncation_side"),
            ({"priority": 1 << 40}, "priority"),
            ({"cache_salt": ""}, "cache_salt"),
            ({"cache_salt": "x" * 1025}, "cache_salt"),
            ({"request_id": "a b"}, "request_id"),
            ({"request_id": "x" * 129}, "request_id"),
            ({"request_id": "x" * (1 << 20)}, "request_id"),
            ({"request_id": "a\nb"}, "request_id"),
            ({"timeout": 0}, "timeout"),
            ({"timeout": 601}, "timeout"),
        ],
    )
    def test_wrong_values(self, client, extra, param):
        check_refused(client, COMPLETIONS, {"prompt": CANARY, **extra}, param)


class TestDrawing:
    def test_restrictions_reach_the_sampler(self, client):
        choice = complete(client, allowed_token_ids=[70, 71], bad_words=["on", " the"], return_token_ids=True)
        assert set(choice["token_ids"]) <= {70, 71}
        (request,) = client.engine.requests
        assert request.sampling.allowed_token_ids == (70, 71)
        encode = client.engine.tokenizer.encode
        forms = [tuple(encode(text, add_special_tokens=False)) for text in ("on", " on", "the", " the")]
        assert request.sampling.bad_words == tuple(forms)

    def test_asked_tokens_are_reported_at_every_generated_token(self, client):
        found = complete(client, logprob_token_ids=[70, 71])["logprobs"]["top_logprobs"]
        names = {client.engine.tokenizer.token_text(token) for token in (70, 71)}
        assert all(names <= top.keys() for top in found)
        assert found[0][client.engine.tokenizer.token_text(70)] == logprob(CAT, 70, 2)


class TestPromptLogprobs:
    def test_shape_of_vllm(self, client):
        choice = complete(client, prompt=[THE, CAT, 70], prompt_logprobs=2)
        first, second, third = choice["prompt_logprobs"]
        assert first is None
        assert choice["logprobs"] is None
        assert second[str(CAT)]["logprob"] == logprob(THE, CAT, 1)
        assert second[str(CAT)]["decoded_token"] == " cat"
        for place in (second, third):
            ranked = {entry["rank"]: entry["logprob"] for entry in place.values()}
            assert ranked.keys() >= {1, 2}
            assert ranked[1] >= ranked[2]
        size = client.engine.config.vocab_size
        above = sum(logprob(CAT, token, 2) > logprob(CAT, 70, 2) for token in range(size))
        assert third["70"]["rank"] == above + 1 > 2

    def test_own_token_among_the_likeliest_is_there_once_with_its_rank(self, client):
        size = client.engine.config.vocab_size
        best = max(range(size), key=lambda token: logprob(THE, token, 1))
        place = complete(client, prompt=[THE, best], prompt_logprobs=1)["prompt_logprobs"][1]
        assert place.keys() == {str(best)}
        assert place[str(best)]["rank"] == 1

    def test_beside_an_echo_each_has_its_own_width(self, client):
        choice = complete(client, echo=True, logprobs=1, prompt_logprobs=3)
        assert len(choice["prompt_logprobs"][1]) >= 3
        assert len(choice["logprobs"]["top_logprobs"][1]) <= 2
        assert choice["logprobs"] == complete(client, echo=True, logprobs=1)["logprobs"]


class TestTruncation:
    @pytest.mark.parametrize(
        ("extra", "left"),
        [
            ({"truncate_prompt_tokens": 2}, (72, 73)),
            ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, (70, 71)),
            ({"truncate_prompt_tokens": 9}, (70, 71, 72, 73)),
            ({"truncate_prompt_tokens": -1, "max_tokens": 61}, (71, 72, 73)),
        ],
    )
    def test_of_ids(self, client, extra, left):
        complete(client, prompt=[70, 71, 72, 73], **extra)
        assert client.engine.requests[0].prompt == left

    def test_echo_is_of_what_is_read(self, client):
        choice = complete(client, prompt="on the cat", truncate_prompt_tokens=2, echo=True, logprobs=0)
        assert choice["text"].startswith(" the cat")
        assert choice["logprobs"]["text_offset"][:2] == [0, 4]

    def test_text_far_above_the_models_length(self, client):
        complete(client, prompt="the cat " * 5000, truncate_prompt_tokens=-1)
        assert len(client.engine.requests[0].prompt) == 60


class TestStreaming:
    def test_interval_gathers_tokens_after_the_first(self, client):
        chunks = stream(client, max_tokens=8, stream_interval=3, logprobs=0, return_token_ids=True)
        sizes = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks]
        assert sizes == [1, 3, 3, 1]
        assert [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks] == sizes
        whole = complete(client, max_tokens=8, logprobs=0)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
        offsets = [o for chunk in chunks for o in chunk["choices"][0]["logprobs"]["text_offset"]]
        assert offsets == whole["logprobs"]["text_offset"]

    def test_progress_while_the_prompt_is_read(self, client):
        chunks = stream(client, return_progress=True, prompt=[THE] * 10, stream_interval=3)
        progress = [chunk for chunk in chunks if "prompt_progress" in chunk]
        assert chunks[: len(progress)] == progress
        assert [chunk["choices"] for chunk in progress] == [[], []]
        assert progress[0]["prompt_progress"] == {
            "index": 0,
            "total": 10,
            "cache": 1,
            "processed": 5,
            "time_ms": 250,
        }
        assert progress[1]["prompt_progress"]["processed"] == 10
        assert chunks[2:] == [
            {**chunk, "id": chunks[2]["id"], "created": chunks[2]["created"]}
            for chunk in stream(client, prompt=[THE] * 10, stream_interval=3)
        ]

    def test_no_comments_while_there_is_news(self, client):
        answer = client.post(COMPLETIONS, json={"prompt": "the", "stream": True})
        assert "keep-alive" not in answer.text


class TestCost:
    def test_is_bounded_before_work_begins(self):
        with serving(FakeEngine(), max_request_tokens=100) as client:
            body = {"prompt": [[70] * 10, [71] * 20], "max_tokens": 10, "n": 2}
            check_refused(
                client,
                COMPLETIONS,
                {**body, "n": 3},
                "max_tokens",
                code="request_too_large",
                says="n 3 x (30 prompt tokens + 20 tokens to generate) = 150 tokens are above the limit",
            )
            assert client.post(COMPLETIONS, json=body).status_code == 200

    def test_a_prompt_that_is_too_long_is_told_so(self):
        with serving(FakeEngine(), max_request_tokens=100) as client:
            body = {"prompt": "the", "max_tokens": 1 << 30}
            check_refused(client, COMPLETIONS, body, "max_tokens", code="context_length_exceeded")


class TestScheduling:
    def test_wishes_reach_the_engine(self, client):
        complete(client, priority=-3, user="me", cache_salt="s")
        (request,) = client.engine.requests
        found = request.scheduling
        assert (found.priority, found.tenant, found.cache_salt) == (-3, "me", "s")
        assert found.deadline is not None

    def test_key_stands_for_the_user(self):
        with serving(api_key=("one", "two")) as client:
            for key in ("one", "two", "one"):
                headers = {"authorization": f"Bearer {key}"}
                body = {"prompt": "the", "user": "me"}
                assert client.post(COMPLETIONS, json=body, headers=headers).status_code == 200
            first, second, third = [request.scheduling.tenant for request in client.engine.requests]
        assert first == third
        assert len({first, second, "me"}) == 3
        assert "one" not in first

    def test_time_limit_ends_the_text(self, client):
        choice = complete(client, timeout=1e-9)
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "length", "timeout")

    def test_servers_own_time_limit_holds_for_all(self):
        with serving(request_timeout=1e-9) as client:
            assert complete(client)["stop_reason"] == "timeout"


class TestRequestId:
    @pytest.mark.parametrize(
        ("header", "field", "name"),
        [("h-1", None, "h-1"), ("h-1", "b-1", "h-1"), (None, "b-1", "b-1"), ("not sane", "b-1", "b-1")],
    )
    def test_header_then_body(self, client, header, field, name):
        headers = {} if header is None else {"x-request-id": header}
        body = {"prompt": "the", "max_tokens": 1, "request_id": field}
        answer = client.post(COMPLETIONS, json=body, headers=headers)
        assert answer.json()["id"] == f"cmpl-{name}"
        assert answer.headers["x-request-id"] == name
        assert client.engine.requests[0].request_id.startswith(f"cmpl-{name}")

    def test_one_is_made_where_none_is_given(self, client):
        first, second = (client.post(COMPLETIONS, json={"prompt": "the"}) for _ in range(2))
        assert first.json()["id"] == f"cmpl-{first.headers['x-request-id']}"
        assert first.json()["id"] != second.json()["id"]

    def test_a_name_may_be_used_twice(self, client):
        for _ in range(2):
            complete(client, request_id="same", n=2)
        assert len({request.request_id for request in client.engine.requests}) == 4


def test_fingerprint_tells_models_and_dtypes_apart():
    narrow = FakeEngine()
    narrow.dtype_name = "bfloat16"
    prints = []
    for engine in (FakeEngine(), FakeEngine(), FakeEngine(max_model_len=99), narrow):
        with serving(engine) as client:
            prints.append(client.post(COMPLETIONS, json={"prompt": [BOS]}).json()["system_fingerprint"])
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
