"""POST /tokenize with messages, and what the model's description says."""

from __future__ import annotations

import pytest

from fakes import BOS, CANARY, FakeEngine, check_refused, serving

TEMPLATE = "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}{{ '!' if add_generation_prompt }}"
MESSAGES = [{"role": "user", "content": "the"}]


@pytest.fixture
def client():
    with serving(FakeEngine(chat_template=TEMPLATE, adds_bos=True)) as client:
        yield client


def tokens(client, **body):
    answer = client.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["tokens"]


def test_conversation_is_tokenised_as_the_chat_reads_it(client):
    found = tokens(client, messages=MESSAGES)
    client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1})
    assert tuple(found) == client.engine.requests[-1].prompt
    assert found[0] == BOS
    assert found.count(BOS) == 1
    assert len(tokens(client, messages=MESSAGES, add_generation_prompt=False)) == len(found) - 1


def test_prompts_keep_the_tokenizers_rule(client):
    assert tokens(client, prompt="the") == [BOS, 259]
    assert tokens(client, prompt="the", add_special_tokens=False) == [259]


def test_wrong_bodies(client):
    check_refused(client, "/tokenize", {}, "prompt", code="missing_field")
    check_refused(client, "/tokenize", {"prompt": CANARY, "messages": MESSAGES}, "messages")
    with serving() as other:
        check_refused(other, "/tokenize", {"messages": MESSAGES}, "messages", code="no_chat_template")


def test_tokenizer_info_has_what_harnesses_ask_for(client):
    assert client.get("/tokenizer_info").json() == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": None,
        "chat_template": TEMPLATE,
    }


def test_model_is_described(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == model["root"] == "fake"
    assert model["parent"] is None
    assert model["max_model_len"] == 64
