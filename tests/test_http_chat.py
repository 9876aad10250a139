"""POST /v1/chat/completions: OpenAI's shapes over the model's own chat template."""

from __future__ import annotations

import json

import pytest

from dape_engine.errors import ModelFolderError
from dape_server.app import create_app
from dape_server.settings import ServerSettings
from fakes import BOS, CANARY, FakeEngine, check_refused, events, logprob, serving

CHAT = "/v1/chat/completions"
TEMPLATE = """\
{% for message in messages %}
    {% if message.role == "developer" %}
        {{ raise_exception("There are no developers, only " + messages[-1].content) }}
    {% endif %}
    {% if loop.first and message.role == "assistant" %}
        {{ raise_exception("The user begins") }}
    {% endif %}
{{ bos_token }}{{ message.role }}{{ "/" + message.name if message.name }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
assistant: {% endif %}
"""
HELLO = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def client():
    with serving(FakeEngine(chat_template=TEMPLATE)) as client:
        yield client


def chat(client, **body):
    answer = client.post(CHAT, json={"messages": HELLO, "max_completion_tokens": 4, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client, **body):
    body = {"messages": HELLO, "max_completion_tokens": 4, "stream": True, **body}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return events(answer.text)


def prompt_of(client):
    tokenizer = client.engine.tokenizer
    return tokenizer.decode(client.engine.requests[-1].prompt, skip_special_tokens=False)


def test_plain_answer_has_openai_shape(client):
    answer = chat(client)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    tokens = answer["usage"]["prompt_tokens"]
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "on the caton"},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": tokens,
            "completion_tokens": 4,
            "total_tokens": tokens + 4,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


class TestTemplate:
    def test_messages_become_the_prompt(self, client):
        messages = [
            {"role": "system", "content": "on"},
            {"role": "user", "content": "the", "name": "me"},
        ]
        chat(client, messages=messages)
        assert prompt_of(client) == "<s>system: on\n<s>user/me: the\nassistant: "

    def test_special_tokens_are_the_templates_own(self, client):
        chat(client)
        assert client.engine.requests[-1].prompt.count(BOS) == 1

    def test_without_a_generation_prompt(self, client):
        chat(client, add_generation_prompt=False)
        assert prompt_of(client) == "<s>user: the cat\n"

    def test_content_in_parts(self, client):
        parts = [{"type": "text", "text": "on"}, {"type": "text", "text": "the"}]
        chat(client, messages=[{"role": "user", "content": parts}])
        assert prompt_of(client) == "<s>user: on\nthe\nassistant: "

    def test_refusal_of_the_template_is_told(self, client):
        body = {"messages": [{"role": "assistant", "content": CANARY}]}
        check_refused(client, CHAT, body, "messages", code="chat_template", says="The user begins")

    def test_refusal_that_quotes_the_client_is_not_repeated(self, client):
        body = {"messages": [{"role": "developer", "content": CANARY}]}
        check_refused(client, CHAT, body, "messages", code="chat_template", says="they are refused")

    @pytest.mark.parametrize(
        "template",
        [
            "{{ messages[7].content.x }}",
            "{{ messages[0].content + 1 }}",
            "{{ 1 / 0 }}",
            "{{ messages[0].__class__.__mro__ }}",
            "{{ messages.append(1) }}",
            "{% for x in range(10000000) %}x{% endfor %}",
            "{% for x in range(90000) %}{{ messages[0].content * 100 }}{% endfor %}",
        ],
    )
    def test_failing_and_evil_templates_fail_one_request(self, template):
        with serving(FakeEngine(chat_template=template)) as client:
            check_refused(
                client,
                CHAT,
                {"messages": [{"role": "user", "content": CANARY}]},
                "messages",
                code="chat_template",
            )

    def test_sandbox_gives_no_attributes_away(self):
        with serving(FakeEngine(chat_template="x{{ messages[0].content.__class__ }}")) as client:
            answer = client.post(CHAT, json={"messages": HELLO})
            assert answer.status_code == 400 or "class" not in prompt_of(client)

    def test_json_filter_does_not_escape_for_html(self):
        with serving(FakeEngine(chat_template="{{ messages[0].content | tojson }}")) as client:
            chat(client, messages=[{"role": "user", "content": "<é'>"}])
            assert prompt_of(client) == '"<é\'>"'

    def test_broken_template_is_found_at_the_start(self):
        with pytest.raises(ModelFolderError, match="chat template, line 2"):
            create_app(FakeEngine(chat_template="\n{% if %}"), ServerSettings())

    def test_model_without_one_refuses(self):
        with serving(FakeEngine()) as client:
            check_refused(
                client,
                CHAT,
                {"messages": [{"role": "user", "content": CANARY}]},
                "messages",
                code="no_chat_template",
                says="/v1/completions",
            )


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3, "seed": 4},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": "the c", "max_completion_tokens": 9},
        {"return_token_ids": True, "stream_interval": 2},
        {"structured_outputs": {"choice": ["on the"]}},
    ],
)
def test_stream_adds_up_to_the_whole_answer(client, extra):
    chunks = stream(client, **extra)
    extra.pop("stream_interval", None)
    whole = chat(client, **extra)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        opening, *parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert opening["delta"] == {"role": "assistant", "content": ""}
        assert all(part["delta"].keys() == {"content"} for part in parts)
        assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        if choice["logprobs"]:
            found = [entry for part in parts for entry in part["logprobs"]["content"]]
            assert found == choice["logprobs"]["content"]
        if "token_ids" in choice:
            assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
            assert opening["prompt_token_ids"] == choice["prompt_token_ids"]


def test_usage_chunk_comes_last_and_alone(client):
    *chunks, last = stream(client, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


def test_logprobs_have_the_chats_shape(client):
    (choice,) = chat(client, logprobs=True, top_logprobs=2, max_completion_tokens=1)["choices"]
    (entry,) = choice["logprobs"]["content"]
    prompt = client.engine.requests[0].prompt
    token = client.engine.script[0]
    assert (entry["token"], entry["bytes"]) == ("on", [111, 110])
    assert entry["logprob"] == logprob(prompt[-1], token, len(prompt))
    assert len(entry["top_logprobs"]) == 2
    assert all(other.keys() == {"token", "logprob", "bytes"} for other in entry["top_logprobs"])
    assert choice["logprobs"]["refusal"] is None


def test_prompt_logprobs_and_asked_tokens(client):
    (choice,) = chat(client, logprobs=True, logprob_token_ids=[70], prompt_logprobs=1)["choices"]
    assert len(choice["prompt_logprobs"]) == len(client.engine.requests[0].prompt)
    assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [1] * 4


@pytest.mark.parametrize(
    "body",
    [{"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_tokens": 2, "max_completion_tokens": 2}],
)
def test_either_name_of_the_token_limit(client, body):
    answer = client.post(CHAT, json={"messages": HELLO, **body})
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_without_a_limit_the_context_is_filled(client):
    usage = client.post(CHAT, json={"messages": HELLO}).json()["usage"]
    assert usage["total_tokens"] == client.engine.max_model_len


def test_long_conversation_is_refused_or_truncated(client):
    messages = [{"role": "user", "content": CANARY * 20}]
    check_refused(client, CHAT, {"messages": messages}, "messages", code="context_length_exceeded")
    chat(client, messages=messages, truncate_prompt_tokens=-1)
    assert len(client.engine.requests[-1].prompt) == 60


def test_response_format(client):
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (choice,) = chat(client, response_format=wanted, max_completion_tokens=30)["choices"]
    assert json.loads(choice["message"]["content"])["on"] in (True, False)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": HELLO * 1025}, "messages"),
        ({"messages": [{"role": "tool", "content": CANARY}]}, "messages.role"),
        ({"messages": [{"role": "user"}]}, "messages.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.content"),
        ({"messages": [{"role": "user", "content": CANARY, "more": 1}]}, "messages.more"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [CANARY]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 257}]}, "messages"),
        ({"prompt": CANARY}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_wrong_bodies_are_refused_by_name(client, extra, param):
    check_refused(client, CHAT, {"messages": [{"role": "user", "content": CANARY}], **extra}, param)


def test_switched_off_fields_are_taken(client):
    off = {
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "chat_template_kwargs": {},
        "store": False,
        "metadata": {},
        "service_tier": "auto",
        "modalities": ["text"],
        "echo": False,
    }
    assert chat(client, **off)["choices"] == chat(client)["choices"]
