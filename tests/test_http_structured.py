"""Structured output over HTTP: every form of it works, and wrong ones are refused by name."""

from __future__ import annotations

import json

import pytest

from fakes import CANARY, COMPLETIONS, FakeEngine, check_refused, events, serving

OBJECT = {
    "type": "object",
    "properties": {"the": {"type": "integer", "maximum": 9}, "on": {"enum": ["cat", "on"]}},
    "required": ["the", "on"],
    "additionalProperties": False,
}
OPENAI = {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT, "strict": True}}


@pytest.fixture
def client():
    with serving(FakeEngine(script="on the cat", max_model_len=256)) as client:
        yield client


def complete(client, **body):
    answer = client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": 60, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": OPENAI},
        {"structured_outputs": {"json": OBJECT}},
        {"structured_outputs": {"json": json.dumps(OBJECT)}},
    ],
)
def test_json_schema(client, body):
    (choice,) = complete(client, **body)
    value = json.loads(choice["text"])
    assert value["on"] in ("cat", "on")
    assert 0 <= value["the"] <= 9 or value["the"] < 0
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
    ],
)
def test_any_object(body):
    with serving(FakeEngine(script='["the":{"cat":[]}]')) as client:
        # Where a bracket may not stand, the fake takes the first token that may.
        assert isinstance(json.loads(complete(client, **body)[0]["text"]), dict)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"regex": "(on|the)( cat){2}"}, "on cat cat"),
        ({"choice": ["a cat", "on the cat", "the"]}, "on the cat"),
        ({"grammar": 'start: "on" (" the" " cat")+ "!"'}, "on the cat!"),
        ({"grammar": 'root ::= x " the" " cat" "!"\nx ::= "on"'}, "on the cat!"),
    ],
)
def test_other_forms(client, wanted, text):
    (choice,) = complete(client, structured_outputs=wanted)
    assert choice["text"] == text
    assert choice["finish_reason"] == "stop"


def test_text_is_any_text(client):
    (choice,) = complete(client, response_format={"type": "text"}, max_tokens=3)
    assert choice["text"] == "on the cat"
    assert client.engine.requests[0].constraint is None


def test_every_completion_has_its_own_state(client):
    choices = complete(client, prompt=["the", "on"], n=2, structured_outputs={"regex": "(on){3}"})
    assert [choice["text"] for choice in choices] == ["ononon"] * 4
    assert len({id(request.constraint) for request in client.engine.requests}) == 4


def test_streamed(client):
    body = {"prompt": "the", "max_tokens": 60, "stream": True, "structured_outputs": {"choice": ["on the"]}}
    chunks = events(client.post(COMPLETIONS, json=body).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "on the"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"response_format": OPENAI, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [5]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "[a-z"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"const": 1, "const": 2}'}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "wat"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '"' + "x" * 70_000 + '"'}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [5]}, "allowed_token_ids"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format.json_schema.schema",
        ),
        *(
            ({field: "a"}, field)
            for field in ("guided_json", "guided_regex", "regex", "ebnf", "grammar", "json_schema")
        ),
    ],
)
def test_wrong_forms_are_refused_by_name(client, body, param):
    check_refused(client, COMPLETIONS, {"prompt": CANARY, **body}, param)


def test_refusal_says_what_to_use_instead(client):
    check_refused(
        client,
        COMPLETIONS,
        {"prompt": CANARY, "guided_choice": ["a"]},
        "guided_choice",
        code="unsupported_parameter",
        says="structured_outputs",
    )
