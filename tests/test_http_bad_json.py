"""Bad bodies, and text that is unusual but right.

JSON that two parsers could read differently is refused; every text that is valid Unicode is served.
"""

from __future__ import annotations

import pytest

from fakes import CANARY, COMPLETIONS, JSON, PERPLEXITY, check_refused, serving


@pytest.fixture(scope="module")
def client():
    with serving() as client:
        yield client


@pytest.mark.parametrize("path", [COMPLETIONS, PERPLEXITY, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="depth of arrays"),
        pytest.param(b'{"prompt":' * 100_000, id="depth of objects"),
        pytest.param(b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}", id="closed depth"),
        pytest.param(b'{"prompt": "the", "prompt": "swordfish"}', id="duplicate keys"),
        pytest.param(b'{"prompt": "the"} {"n": 2}', id="trailing value"),
        pytest.param(b'{"prompt": "the"}\x00', id="trailing NUL"),
        pytest.param(b'\xef\xbb\xbf{"prompt": "the"}', id="byte-order mark"),
        pytest.param('{"prompt": "the"}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b'{"prompt": "\xff"}', id="invalid UTF-8"),
        pytest.param(b'{"prompt": "\xc0\xaf"}', id="over-long UTF-8"),
        pytest.param(b'{"prompt": "\xed\xa0\x80"}', id="encoded surrogate"),
        pytest.param(b'{"prompt": "\\ud83d"}', id="lone high surrogate"),
        pytest.param(b'{"prompt": "\\ude42\\ud83d"}', id="swapped surrogates"),
        pytest.param(b'{"prompt": "a\x00b"}', id="raw NUL"),
        pytest.param(b"{'prompt': 'the'}", id="single quotes"),
        pytest.param(b'{"prompt": "the",}', id="trailing comma"),
        pytest.param(b'{"prompt": "swordf', id="cut off"),
        pytest.param(b'{"prompt": ' + b"9" * 5000 + b"}", id="number of 5000 digits"),
    ],
)
def test_broken_or_ambiguous_json_refused(client, path, body):
    check_refused(client, path, body, code="invalid_json")


@pytest.mark.parametrize("body", [b"[]", b'"the"', b"5", b"null", b"true", b"[[{}]]"])
def test_body_must_be_an_object(client, body):
    check_refused(client, COMPLETIONS, body, code="invalid_body")


def test_empty_body_refused(client):
    check_refused(client, COMPLETIONS, b"", code="invalid_body")


def test_key_of_a_megabyte_is_not_repeated(client):
    key = CANARY * 120_000
    answer = client.post(COMPLETIONS, json={"prompt": "the", key: 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unknown_field"
    assert len(answer.text) < 400


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "json", "a/b/c"]
)
def test_wrong_content_type_refused(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post(COMPLETIONS, content=b'{"prompt": "the"}', headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/a+json"]
)
def test_json_content_types_are_served(client, kind):
    answer = client.post(COMPLETIONS, content=b'{"prompt": "the"}', headers={"content-type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
def test_compressed_body_refused_unread(client, encoding):
    answer = client.post(
        COMPLETIONS, content=b"\x1f\x8b bomb", headers={**JSON, "content-encoding": encoding}
    )
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_encoding"


@pytest.mark.parametrize(
    "text",
    [
        "a\x00b",
        "\x00",
        "é e\u0301",
        "🙂👩‍👩‍👧",
        "שלום abc",
        "\u202eabc\u202c",
        "\ufeffthe",
        "<|endoftext|>",
        "<s>the<s>",
        "\r\n\t ",
        "\uffff\U0010ffff",
    ],
    ids=ascii,
)
def test_unusual_text_comes_back_unchanged(client, text):
    body = {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 0}
    answer = client.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["text"] == text
    ids = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == text
    assert len(choice["logprobs"]["tokens"]) == len(ids)


def test_special_token_text_is_read_as_the_token(client):
    assert client.post("/tokenize", json={"prompt": "<s>the"}).json()["tokens"][0] == 1
