"""POST /v1/completions: every accepted parameter does what it says, whole or streamed."""

from __future__ import annotations

import pytest

from dape_engine.errors import EngineStoppedError, StepError
from fakes import BOS, COMPLETIONS, EOS, FakeEngine, events, logprob, serving


@pytest.fixture
def client():
    with serving() as client:
        yield client


def complete(client, **body):
    answer = client.post(COMPLETIONS, json={"prompt": "the cat", "max_tokens": 4, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client, **body):
    answer = client.post(COMPLETIONS, json={"prompt": "the cat", "max_tokens": 4, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def test_plain_answer_has_openai_shape(client):
    answer = complete(client)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "object": "text_completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "text": "on the caton",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 4,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_sixteen_tokens_by_default(client):
    assert client.post(COMPLETIONS, json={"prompt": "the"}).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"echo": True},
        {"echo": True, "logprobs": 2, "n": 2, "temperature": 0.5, "seed": 3},
        {"prompt": ["the cat", "on"], "n": 2, "return_token_ids": True},
        {"logprobs": 0, "return_tokens_as_token_ids": True},
        {"stop": "the c", "max_tokens": 9},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
    ],
)
def test_stream_adds_up_to_the_whole_answer(client, extra):
    whole = complete(client, **extra)
    chunks = stream(client, **extra)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        for key in choice["logprobs"] or ():
            assert [value for part in parts for value in part["logprobs"][key]] == choice["logprobs"][key]
        if "token_ids" in choice:
            assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
            assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]


def test_usage_chunk_comes_last_and_alone(client):
    *chunks, last = stream(client, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 6


def test_continuous_usage_grows_to_the_total(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c["usage"]["completion_tokens"] for c in stream(client, stream_options=options, n=2)]
    assert counts == [1, 2, 3, 4, 5, 6, 7, 8, 8]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("the", [(259,)]),
        (["the", " cat"], [(259,), (264,)]),
        ([259, 264], [(259, 264)]),
        ([[259], [264, 5]], [(259,), (264, 5)]),
    ],
)
def test_all_forms_of_prompts(client, prompt, ids):
    answer = complete(client, prompt=prompt)
    assert [request.prompt for request in client.engine.requests] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_bos_is_added_to_text_by_the_tokenizers_rule_and_never_to_ids():
    with serving(FakeEngine(adds_bos=True)) as client:
        complete(client, prompt="the")
        complete(client, prompt="the", add_special_tokens=False)
        complete(client, prompt=[259])
        assert [request.prompt for request in client.engine.requests] == [(BOS, 259), (259,), (259,)]


def test_bos_spelled_in_the_text_is_not_added_once_more():
    with serving(FakeEngine(adds_bos=True)) as client:
        complete(client, prompt="<s>the")
        complete(client, prompt="<s><s>the", add_special_tokens=False)
        assert [request.prompt for request in client.engine.requests] == [(BOS, 259), (BOS, BOS, 259)]


def test_nth_completion_is_drawn_with_seed_plus_index(client):
    answer = complete(client, prompt=["the", "on"], n=3, seed=2**63 - 2)
    seeds = [request.sampling.seed for request in client.engine.requests]
    assert seeds == [2**63 - 2, 2**63 - 1, 0] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    alone = complete(client, prompt="on", seed=2**63 - 1)
    assert alone["choices"][0]["text"] == answer["choices"][4]["text"]


def test_every_parameter_reaches_the_sampler(client):
    body = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 4,
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 1,
    }
    complete(client, **body, stop=["x", "yz"], logit_bias={"5": -1}, best_of=1, user="me", model="fake")
    (request,) = client.engine.requests
    sampling = request.sampling
    shown = {name: getattr(sampling, name) for name in body}
    assert shown == {**body, "stop_token_ids": (7,)}
    assert sampling.stop == ("x", "yz")
    assert sampling.logit_bias == ((5, -1.0),)


class TestLogprobs:
    def test_echo_with_one_token_gives_one_entry_more_than_the_prompt(self, client):
        """The request of lm-eval, which reads token_logprobs[ctxlen:-1] and top_logprobs."""
        prompt = [259, 264, 70, 71, 259]
        body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
        choice = complete(client, prompt=[prompt], **body)["choices"][0]
        found = choice["logprobs"]
        assert all(len(values) == len(prompt) + 1 for values in found.values())
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        tokens = [*prompt, client.engine.script[0]]
        expected = [logprob(tokens[i - 1], tokens[i], i) for i in range(1, len(tokens))]
        assert found["token_logprobs"][1:] == expected
        for value, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
            assert value in top.values()
            assert max(top.values()) >= value

    def test_greedy_token_equals_the_maximum_exactly(self, client):
        size = client.engine.config.vocab_size
        best = max(range(size), key=lambda token: logprob(259, token, 1))
        choice = complete(client, prompt=[259, best], echo=True, max_tokens=1, logprobs=1)["choices"][0]
        assert choice["logprobs"]["token_logprobs"][1] == max(choice["logprobs"]["top_logprobs"][1].values())
        assert len(choice["logprobs"]["top_logprobs"][1]) == 1

    def test_end_of_text_token_has_its_entry(self):
        with serving(FakeEngine(script="on", ends=True)) as client:
            choice = complete(client, logprobs=0, return_token_ids=True)["choices"][0]
        assert choice["text"] == "on"
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] is None
        assert choice["token_ids"][-1] == EOS
        assert choice["logprobs"]["tokens"] == ["on", "<|endoftext|>"]
        assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [1, 1]

    @pytest.mark.parametrize("adds_bos", [False, True])
    @pytest.mark.parametrize("text", ["the cat on", "a🙂b", "<s>the"])
    def test_offsets_point_into_the_text(self, text, adds_bos):
        with serving(FakeEngine(adds_bos=adds_bos)) as client:
            choice = complete(client, prompt=text, echo=True, logprobs=0)["choices"][0]
        found = choice["logprobs"]
        assert choice["text"].startswith(text)
        assert found["text_offset"] == sorted(found["text_offset"])
        for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[adds_bos:]:
            assert token.startswith("bytes:") or choice["text"].startswith(token, offset)

    def test_without_echo_offsets_begin_at_zero(self, client):
        found = complete(client, logprobs=0)["choices"][0]["logprobs"]
        assert found["text_offset"] == [0, 2, 6, 10]

    def test_tokens_as_token_ids(self, client):
        found = complete(client, logprobs=1, return_tokens_as_token_ids=True, max_tokens=1)["choices"][0]
        token = client.engine.script[0]
        assert found["logprobs"]["tokens"] == [f"token_id:{token}"]
        assert f"token_id:{token}" in found["logprobs"]["top_logprobs"][0]

    def test_one_token_scored_alone_has_nothing_to_report(self, client):
        choice = complete(client, prompt=[259], echo=True, max_tokens=0, logprobs=3)["choices"][0]
        assert choice["text"] == "the"
        assert choice["logprobs"] == {
            "tokens": ["the"],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [0],
        }


def test_echo_of_ids_is_their_text(client):
    choice = complete(client, prompt=[BOS, 259, 264], echo=True, max_tokens=1, return_token_ids=True)[
        "choices"
    ][0]
    assert choice["text"] == "<s>the caton"
    assert choice["prompt_token_ids"] == [BOS, 259, 264]
    assert choice["token_ids"] == client.engine.script[:1]


@pytest.mark.parametrize(
    ("stop", "include", "text", "reason"),
    [
        ("the c", False, "on ", "the c"),
        (["zz", "the c"], True, "on the c", "the c"),
        (["on t", "n"], False, "o", "n"),
        ([], False, "on the caton", None),
    ],
)
def test_stop_strings_span_tokens(client, stop, include, text, reason):
    choice = complete(client, stop=stop, include_stop_str_in_output=include)["choices"][0]
    assert choice["text"] == text
    assert choice["stop_reason"] == reason
    assert choice["finish_reason"] == ("length" if reason is None else "stop")


def test_emoji_split_over_tokens_is_streamed_whole():
    with serving(FakeEngine(script="a🙂b")) as client:
        texts = [chunk["choices"][0]["text"] for chunk in stream(client, max_tokens=6)]
    assert texts == ["a", "", "", "", "🙂", "b"]


class TestErrors:
    def test_full_queue_is_429_with_retry_after_and_frees_what_was_taken(self):
        with serving(FakeEngine(max_num_queued_reqs=3)) as client:
            for streamed in (False, True):
                answer = client.post(COMPLETIONS, json={"prompt": "the", "n": 4, "stream": streamed})
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "7"
                assert answer.json()["error"]["type"] == "rate_limit_error"
                assert client.engine.free_blocks == client.engine.num_blocks
            assert complete(client, n=3)["usage"]["completion_tokens"] == 12

    @pytest.mark.parametrize("streamed", [False, True])
    def test_failed_step_before_the_first_token_is_500(self, client, streamed):
        client.engine.fails_with = StepError("the model failed on this request")
        answer = client.post(COMPLETIONS, json={"prompt": "the", "stream": streamed})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "step_failed"

    def test_defect_says_nothing_of_the_process(self, client):
        client.engine.fails_with = ZeroDivisionError("at 0x7f00deadbeef")
        answer = client.post(COMPLETIONS, json={"prompt": "the"})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "0x7f" not in answer.text
        assert answer.headers["x-request-id"]
        assert 'method="POST",status="500"' in client.get("/metrics").text

    def test_engine_stopped_is_503(self, client):
        client.engine.stopped = True
        answer = client.post(COMPLETIONS, json={"prompt": "the"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (StepError("the model failed"), "step_failed"),
            (EngineStoppedError("stopped"), "engine_stopped"),
            (ZeroDivisionError("0xdeadbeef"), "internal_error"),
        ],
    )
    def test_failure_in_a_stream_is_its_last_event(self, client, error, code, monkeypatch):
        draw = client.engine._draw

        def fail_at_second(sampling, place):
            if place == 2:
                raise error
            return draw(sampling, place)

        monkeypatch.setattr(client.engine, "_draw", fail_at_second)
        *chunks, last = stream(client)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["on", " the"]
        assert last["error"]["code"] == code
        assert "0xdead" not in str(last)
        assert client.engine.free_blocks == client.engine.num_blocks

    def test_unknown_model_is_404(self, client):
        answer = client.post(COMPLETIONS, json={"prompt": "the", "model": "gpt-\n" + "x" * 5000})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert len(error["message"]) < 200
        assert "\n" not in error["message"]
