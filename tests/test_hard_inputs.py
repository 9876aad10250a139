"""The rest of the list of bad inputs: methods, ids, very long texts, text that is cut between tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dape_engine.engine import AsyncEngine
from dape_engine.errors import ContextLengthError
from dape_engine.options import EngineOptions
from dape_engine.request import GenerationRequest, SamplingParams
from dape_server.app import ROUTERS
from fakes import COMPLETIONS, JSON, PERPLEXITY, FakeEngine, events, serving
from live import live, request, until
from models import write_model

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")


@pytest.fixture(scope="module")
def client():
    with serving(FakeEngine(max_model_len=32)) as client:
        yield client


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_on_every_route(client, method):
    routes = [route for router in ROUTERS for route in router.routes]
    assert len(routes) > 10
    for route in routes:
        if method in route.methods:
            continue
        path = re.sub(r"{[^}]*}", "x", route.path)
        answer = client.request(method, path, content=b"{}", headers=JSON)
        assert answer.status_code == 405, path
        assert set(answer.headers["allow"].split(", ")) == route.methods
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "method_not_allowed"
    assert client.engine.requests == []


@pytest.mark.parametrize("letter", [" ", "x"], ids=["spaces", "one word"])
@pytest.mark.parametrize("path", [COMPLETIONS, PERPLEXITY])
def test_ten_megabytes_of_text_are_refused_at_once(client, path, letter, monkeypatch):
    def tokenise(*_, **__):
        raise AssertionError("tokenised")

    monkeypatch.setattr(client.engine.tokenizer, "encode_pieces", tokenise)
    field = "prompt" if path == COMPLETIONS else "input"
    answer = client.post(path, content=json.dumps({field: letter * 10_000_000}), headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    assert "10000000" in error["message"]
    assert len(answer.text) < 1000
    assert client.engine.free_blocks == client.engine.num_blocks


@pytest.mark.parametrize(
    "ids", [("a", "ab"), ("same", "same"), ("x" * 127, "x" * 128), ("cmpl-0", "cmpl-0-0")]
)
async def test_the_end_of_one_request_is_not_that_of_one_with_a_like_name(ids):
    engine = FakeEngine()
    body = json.dumps({"prompt": "the cat", "max_tokens": 4, "n": 2}).encode()
    async with live(engine) as server:
        engine.gate.clear()
        leaves, stays = await server.connect(), await server.connect()
        for wire, name in zip((leaves, stays), ids, strict=True):
            await wire.send(request("POST", COMPLETIONS, body, f"X-Request-Id: {name}"))
        await until(lambda: len(engine.active) == 4)
        leaves.leave(politely=False)
        await until(lambda: len(engine.active) == 2)
        engine.gate.set()
        answer = await stays.answer()
        assert answer.status == 200
        assert answer.headers["x-request-id"] == ids[1]
        assert [choice["text"] for choice in json.loads(answer.body)["choices"]] == ["on the caton"] * 2
        assert len(engine.aborted) == 2
        await server.check_serving()


@pytest.mark.parametrize("text", ["🙂 the 👩‍👩‍👧", "שלום", "e\u0301", "日本"])
def test_characters_of_many_tokens_are_streamed_whole(text):
    engine = FakeEngine(script=text)
    count = len(engine.script)
    with serving(engine) as client:
        answer = client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": count, "stream": True})
        pieces = [choice["text"] for event in events(answer.text) for choice in event["choices"]]
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
        # Cut in the middle of a character, the text says so rather than losing it.
        answer = client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": count - 1, "stream": True})
        cut = "".join(choice["text"] for event in events(answer.text) for choice in event["choices"])
        assert cut.rstrip("\ufffd") == text[: len(cut.rstrip("\ufffd"))]
        assert engine.free_blocks == engine.num_blocks


@pytest.mark.parametrize(
    ("stop", "kept"), [("n t", "o"), ("e c", "on th"), (" ca", "on the"), ("cato", "on the ")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_across_tokens(client, stop, kept, stream):
    body = {"prompt": "the", "max_tokens": 8, "stop": [stop], "stream": stream}
    answer = client.post(COMPLETIONS, json=body)
    chunks = events(answer.text) if stream else [answer.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == kept
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)


async def test_a_prompt_longer_than_the_whole_cache_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", max_model_len=2048)
    # 2 layers x keys and values x 32 x 4 bytes a token: 10 blocks of 16 tokens.
    engine = AsyncEngine(folder, EngineOptions(kv_cache_memory=10 * 16 * 512))
    engine.start()
    capacity = engine.num_blocks * 16
    assert engine.max_model_len == capacity < 2048
    for prompt, max_tokens in (((5,) * (capacity + 1), 1), ((5,) * capacity, 1), ((5,) * (capacity - 1), 2)):
        sampling = SamplingParams(max_tokens=max_tokens)
        with pytest.raises(ContextLengthError, match=str(capacity)):
            await anext(engine.generate(GenerationRequest("r", prompt, sampling)))
    longest = GenerationRequest("r", (5,) * (capacity - 1), SamplingParams(max_tokens=1))
    assert [output.finish_reason async for output in engine.generate(longest)] == ["length"]
    assert engine.state().free_blocks == engine.num_blocks
    await engine.shutdown(0)
