"""POST /tokenize with messages, and what the model's description says."""

from __future__ import annotations

import asyncio
import json

import pytest

import dape_engine.long_text
import dape_engine.tokenizer
from dape_server.text import TextService
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


@pytest.mark.parametrize("text", ["", "the cat" * 9, "<s>the, the, the"])
def test_long_text_gives_the_same_answer_in_parts(client, monkeypatch, text):
    whole = client.post("/tokenize", json={"prompt": text, "return_token_strs": True})
    for module in (dape_engine.long_text, dape_engine.tokenizer):
        monkeypatch.setattr(module, "PIECE", 4)
    parted = client.post("/tokenize", json={"prompt": text, "return_token_strs": True})
    assert parted.json() == whole.json()
    assert parted.headers["content-length"] == whole.headers["content-length"]
    tokenizer = client.engine.tokenizer
    answer = parted.json()
    assert answer["tokens"] == tokens(client, prompt=text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["token_strs"] == [tokenizer.token_text(token) for token in answer["tokens"]]


def test_ids_of_a_long_text_are_never_one_list(client):
    """To make, write or free millions of Python's integers at once holds up every other thread."""
    encoding = TextService(client.engine.tokenizer, client.engine.config.vocab_size).encode_json(
        "the cat " * 50_000, "prompt", add_special_tokens=True, with_names=True
    )
    encoded = asyncio.run(encoding)
    assert encoded.count == 100_002
    for parts in (encoded.ids, encoded.names):
        assert len(parts) > 4
        assert max(map(len, parts)) < 1 << 20
        assert len(json.loads(b"[" + b"".join(parts) + b"]")) == encoded.count


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
