"""Bad values: each gets a 4xx that names the field, and leaves the server as it was.

After every refusal the free blocks are back, the message holds nothing of the prompt, and the server
answers the next request.
"""

from __future__ import annotations

import json

import pytest

from fakes import CANARY, COMPLETIONS, JSON, PERPLEXITY, FakeEngine, check_refused, serving


@pytest.fixture(scope="module")
def client():
    with serving(FakeEngine(max_model_len=32)) as client:
        yield client


# --- Numbers -------------------------------------------------------------------------------------

INTEGERS = ["max_tokens", "n", "best_of", "logprobs", "top_k", "min_tokens", "seed"]
FLOATS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
NOT_NUMBERS = ['"1"', "true", "[]", "{}", '"NaN"', "[1]"]


@pytest.mark.parametrize(
    "value", [*NOT_NUMBERS, "1.5", "1.0", "1e2", str(2**64), "-9" + "0" * 400, "9" * 4000]
)
@pytest.mark.parametrize("field", INTEGERS)
def test_integer_field_refuses(client, field, value):
    check_refused(client, COMPLETIONS, f'{{"prompt": "{CANARY}", "{field}": {value}}}', field)


@pytest.mark.parametrize(
    "value", [*NOT_NUMBERS, "1e308", "-1e308", "1e999", "-1e999", "9" * 400, str(2**63)], ids=lambda v: v[:9]
)
@pytest.mark.parametrize("field", FLOATS)
def test_float_field_refuses(client, field, value):
    check_refused(client, COMPLETIONS, f'{{"prompt": "{CANARY}", "{field}": {value}}}', field)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "nan", "inf", "1.", ".5", "0x10", "01"])
@pytest.mark.parametrize("field", ["temperature", "max_tokens"])
def test_number_that_is_not_json_refused(client, field, literal):
    body = f'{{"prompt": "{CANARY}", "{field}": {literal}}}'
    check_refused(client, COMPLETIONS, body, code="invalid_json")


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("max_tokens", -1, "0"),
        ("max_tokens", 2**31, str(2**31 - 1)),
        ("max_tokens", 2**63, str(2**31 - 1)),
        ("min_tokens", -1, "0"),
        ("temperature", -0.1, "0"),
        ("temperature", 2.1, "2"),
        ("top_p", 0, "0"),
        ("top_p", -0.0, "0"),
        ("top_p", 1.01, "1"),
        ("top_k", -2, "-1"),
        ("top_k", 2**31, str(2**31 - 1)),
        ("min_p", -1e-9, "0"),
        ("min_p", 1.5, "1"),
        ("presence_penalty", 2.5, "2"),
        ("frequency_penalty", -2.5, "-2"),
        ("repetition_penalty", 0, "0.01"),
        ("repetition_penalty", 5e-324, "0.01"),
        ("repetition_penalty", 101, "100"),
        ("seed", 2**63, str(2**63)),
        ("seed", -(2**63) - 1, str(-(2**63))),
        ("logprobs", -1, "0"),
        ("logprobs", 21, "20"),
        ("n", 0, "1"),
        ("n", 129, "128"),
    ],
)
def test_number_out_of_range_refused_with_limit_and_value(client, field, value, limit):
    body = {"prompt": CANARY, field: value}
    check_refused(client, COMPLETIONS, body, field, says=limit)
    check_refused(client, COMPLETIONS, body, field, says=f"got {value!r}")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.0},
        {"temperature": 5e-324},
        {"top_p": 5e-324},
        {"min_p": -0.0},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"top_k": -1},
        {"top_k": 2**31 - 1},
        {"seed": 2**63 - 1, "n": 2},
        {"seed": -(2**63)},
        {"temperature": 0, "seed": 0},
        {"logit_bias": {"5": -100, "007": 100.0}},
    ],
    ids=json.dumps,
)
def test_numbers_at_the_edge_are_served(client, settings):
    answer = client.post(COMPLETIONS, json={"prompt": "the cat", "max_tokens": 2, **settings})
    assert answer.status_code == 200, answer.text
    sampling = client.engine.requests[-1].sampling
    assert sampling.seed is None or 0 <= sampling.seed < 2**63
    assert sampling.top_k >= 0


@pytest.mark.parametrize(
    "field",
    [
        *(*INTEGERS, *FLOATS, "model", "stream", "stream_options", "echo", "user", "suffix", "stop"),
        *("stop_token_ids", "logit_bias", "ignore_eos"),
    ],
)
def test_null_means_the_default(client, field):
    plain, with_null = (
        client.post(COMPLETIONS, json={"prompt": "the cat", **extra}).json() for extra in ({}, {field: None})
    )
    assert with_null["choices"] == plain["choices"]


@pytest.mark.parametrize("path", [COMPLETIONS, PERPLEXITY])
def test_required_field_is_not_defaulted_by_null(client, path):
    field = "prompt" if path == COMPLETIONS else "input"
    check_refused(client, path, {field: None}, field, code="missing_field")
    check_refused(client, path, {}, field, code="missing_field")


# --- Tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "field"), [(COMPLETIONS, "prompt"), (PERPLEXITY, "input")])
class TestTokens:
    @pytest.mark.parametrize("token", [-1, "size", 2**31, 2**64, 10**400], ids=lambda token: str(token)[:9])
    def test_unknown_id_refused_with_its_place(self, client, path, field, token):
        size = client.engine.config.vocab_size
        token = size if token == "size" else token
        check_refused(client, path, {field: [5, token, 6]}, field, says=f"{field}[1]")
        check_refused(client, path, {field: [[5, 6], [5, token, 6]]}, field, says=f"{field}[1][1]")
        check_refused(client, path, {field: [5, token]}, field, says=f"from 0 to {size - 1}")

    def test_largest_id_is_served(self, client, path, field):
        last = client.engine.config.vocab_size - 1
        assert client.post(path, json={field: [last, 0, last]}).status_code == 200

    @pytest.mark.parametrize("token", [1.5, 1.0, True, None, "7", [7]], ids=repr)
    def test_other_things_than_integers_refused(self, client, path, field, token):
        check_refused(client, path, {field: [5, token]}, field, says=f"{field}[1]")
        check_refused(client, path, {field: [[5], [5, 6, token]]}, field, says=f"{field}[1][2]")

    @pytest.mark.parametrize(
        "value",
        [
            [CANARY, 5],
            [CANARY, [5]],
            [[5], CANARY],
            [[5], 5],
            [None],
            [{}],
            [[[5]]],
            [True],
            [1.0],
            5,
            True,
            {},
        ],
        ids=repr,
    )
    def test_mixed_and_nested_prompts_refused(self, client, path, field, value):
        check_refused(client, path, {field: value}, field)

    @pytest.mark.parametrize("value", [[], [[]], [[5, 6], []], "", ["", "the cat"]], ids=repr)
    def test_empty_prompt_refused(self, client, path, field, value):
        check_refused(client, path, {field: value}, field)


def test_detokenize_checks_ids(client):
    size = client.engine.config.vocab_size
    check_refused(client, "/detokenize", {"tokens": [5, size]}, "tokens", says=str(size))
    check_refused(client, "/detokenize", {"tokens": [5, -1]}, "tokens")
    check_refused(client, "/detokenize", {"tokens": [2**31]}, "tokens")
    check_refused(client, "/detokenize", {"tokens": "5"}, "tokens")


@pytest.mark.parametrize("field", ["stop_token_ids", "logit_bias"])
def test_sampling_ids_must_be_in_the_vocabulary(client, field):
    size = client.engine.config.vocab_size
    value = [size] if field == "stop_token_ids" else {str(size): 1}
    check_refused(client, COMPLETIONS, {"prompt": "the", field: value}, field, says=str(size - 1))


@pytest.mark.parametrize("key", ["-1", "1.0", "", " 1", "x", "१", "1" * 40, "+1", "1_0"])
def test_logit_bias_keys_are_token_ids(client, key):
    check_refused(client, COMPLETIONS, {"prompt": "the", "logit_bias": {key: 1}}, "logit_bias")


def test_logit_bias_names_each_token_once(client):
    check_refused(client, COMPLETIONS, {"prompt": "the", "logit_bias": {"5": 1, "05": 2}}, "logit_bias")


@pytest.mark.parametrize("value", ["1", None, True, 101, -100.5])
def test_logit_bias_values_are_bounded(client, value):
    check_refused(client, COMPLETIONS, {"prompt": "the", "logit_bias": {"5": value}}, "logit_bias")


# --- Lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "max_tokens"), [(1, 31), (31, 1), (30, 2), (16, 16)])
def test_request_of_exactly_the_limit_is_served(client, prompt, max_tokens):
    answer = client.post(COMPLETIONS, json={"prompt": [5] * prompt, "max_tokens": max_tokens})
    assert answer.status_code == 200
    assert answer.json()["usage"]["total_tokens"] == 32


@pytest.mark.parametrize(("prompt", "max_tokens"), [(1, 32), (32, 1), (33, 1), (31, 2), (5, 2**31 - 1)])
def test_request_over_the_limit_is_refused_with_the_numbers(client, prompt, max_tokens):
    body = {"prompt": [5] * prompt, "max_tokens": max_tokens}
    check_refused(
        client, COMPLETIONS, body, "max_tokens", code="context_length_exceeded", says=str(prompt + max_tokens)
    )


@pytest.mark.parametrize("size", [10_000, 2_000_000])
@pytest.mark.parametrize("letter", [" ", "x", "🙂"])
def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(client, letter, size, monkeypatch):
    def tokenise(*_, **__):
        raise AssertionError("tokenised")

    monkeypatch.setattr(client.engine.tokenizer, "encode_pieces", tokenise)
    body = {"prompt": letter * size}
    content = json.dumps(body, ensure_ascii=False).encode()
    answer = client.post(COMPLETIONS, content=content, headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert str(size * len(letter.encode())) in error["message"]


def test_texts_are_bounded_in_all(client):
    texts = ["x" * 3_200_000] * 4
    check_refused(client, PERPLEXITY, {"input": texts, "window": "last"}, "input", says=str(12 << 20))


def test_input_tokens_are_bounded(client):
    check_refused(
        client, PERPLEXITY, {"input": [5] * ((1 << 20) + 1), "window": "last"}, "input", says=str(1 << 20)
    )


@pytest.mark.parametrize("path", ["/tokenize", COMPLETIONS])
def test_body_over_the_limit_is_refused(path):
    with serving(max_body_size=2048) as client:
        body = {"prompt": "x" * 2048}
        check_refused(client, path, body, None, status=413, code="body_too_large", says="2048")
        at_limit = json.dumps({"prompt": "the"}).encode().ljust(2048)
        assert client.post(path, content=at_limit, headers=JSON).status_code == 200


# --- Fan-out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "param", "limit"),
    [
        ({"prompt": ["the"] * 129}, "prompt", "128"),
        ({"prompt": [[5]] * 129}, "prompt", "128"),
        ({"n": 10**6}, "n", "128"),
        ({"prompt": ["the"] * 16, "n": 9}, "n", "144"),
        ({"best_of": 10**6}, "best_of", "1"),
        ({"best_of": 2}, "best_of", "1"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": "x" * 1025}, "stop", "1024"),
        ({"stop": ["ok", "x" * 1_000_000]}, "stop", "1024"),
        ({"stop_token_ids": [5] * 129}, "stop_token_ids", "128"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
        ({"logprobs": 10**6}, "logprobs", "20"),
        ({"user": "x" * 257}, "user", "256"),
    ],
)
def test_fan_out_is_bounded(client, extra, param, limit):
    check_refused(client, COMPLETIONS, {"prompt": "the", **extra}, param, says=limit)


def test_product_of_everything_is_bounded():
    with serving(FakeEngine(max_model_len=20_000)) as client:
        body = {"prompt": "the", "n": 128, "max_tokens": 16_384, "logprobs": 20}
        check_refused(client, COMPLETIONS, body, "logprobs", says=str(1 << 20))
        body = {"prompt": [[5] * 10_000] * 8, "echo": True, "max_tokens": 0, "logprobs": 20}
        check_refused(client, COMPLETIONS, body, "logprobs", says=str(1 << 20))
        body = {"input": [[5] * 10_000] * 8, "return_token_logprobs": True, "top_logprobs": 20}
        check_refused(client, PERPLEXITY, body, "top_logprobs", says=str(1 << 20))


@pytest.mark.parametrize(
    ("extra", "param", "limit"),
    [
        ({"input": ["the cat"] * 129}, "input", "128"),
        ({"lengths": [2] * 65}, "lengths", "64"),
        ({"input": [5] * 70_000, "window": "sliding", "context_length": 2, "stride": 1}, "stride", "65536"),
        ({"input": [5] * 600_000, "window": "sliding", "context_length": 30, "stride": 1}, "stride", "65536"),
        ({"input": [5] * 1_000_000, "window": "disjoint", "context_length": 2}, "context_length", "65536"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
    ],
)
def test_perplexity_fan_out_is_bounded(client, extra, param, limit):
    check_refused(client, PERPLEXITY, {"input": "the cat", **extra}, param, says=limit)


def test_tokens_read_are_bounded():
    with serving(FakeEngine(max_model_len=4096)) as client:
        body = {"input": [5] * 20_000, "window": "sliding", "context_length": 4096, "stride": 3}
        check_refused(client, PERPLEXITY, body, "input", says=str(1 << 24))


# --- Contradictions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"more": True}}, "stream_options.more"),
        ({"stop": ""}, "stop"),
        ({"stop": ["ok", ""]}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stream": "true"}, "stream"),
        ({"echo": 1}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"model": 5}, "model"),
    ],
)
def test_contradiction_refused(client, extra, param):
    check_refused(client, COMPLETIONS, {"prompt": CANARY, **extra}, param)


@pytest.mark.parametrize("field", ["max_completion_tokens", "prompt_embeds", "messages", "Prompt", "n "])
def test_unknown_field_refused_by_name(client, field):
    check_refused(client, COMPLETIONS, {"prompt": "the", field: 1}, field, code="unknown_field")
    check_refused(client, COMPLETIONS, {"prompt": "the", field: None}, field, code="unknown_field")


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"window": "sliding", "context_length": 4, "stride": 5}, "stride"),
        ({"window": "sliding", "context_length": 4, "stride": 0}, "stride"),
        ({"window": "sliding", "context_length": 1}, "context_length"),
        ({"window": "sliding", "context_length": 33}, "context_length"),
        ({"window": "disjoint", "stride": 2}, "stride"),
        ({"window": "last", "score_last": 0}, "score_last"),
        ({"window": "whole"}, "window"),
        ({"stride": 2}, "stride"),
        ({"context_length": 4}, "context_length"),
        ({"score_last": 4}, "score_last"),
        ({"ladder": "suffix"}, "ladder"),
        ({"ladder": "middle", "lengths": [2]}, "ladder"),
        ({"lengths": []}, "lengths"),
        ({"lengths": [1]}, "lengths"),
        ({"lengths": [2, 7]}, "lengths"),
        ({"lengths": [2.0]}, "lengths"),
        ({"lengths": [2], "window": "half", "context_length": 4}, "lengths"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"bos": "yes"}, "bos"),
        ({"input": [5] * 33}, "input"),
        ({"input": [5]}, "input"),
    ],
)
def test_perplexity_contradiction_refused(client, extra, param):
    check_refused(client, PERPLEXITY, {"input": "the cat the cat the cat"[:15], **extra}, param)
