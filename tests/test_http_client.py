"""OpenAI's own client against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import ExitStack

import openai
import pytest

from dape_engine.errors import QueueFullError, StepError
from dape_server.app import create_app
from dape_server.run import make_server
from dape_server.settings import ServerSettings
from fakes import FakeEngine

pytestmark = pytest.mark.client
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
HELLO = [{"role": "system", "content": "on"}, {"role": "user", "content": "the"}]
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.fixture(scope="module")
def url():
    engine = FakeEngine(chat_template=TEMPLATE)
    server = make_server(create_app(engine, ServerSettings(api_key=("k",), access_log=False)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        yield client


def test_models(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "fake"


def test_completion_with_echo_and_logprobs(client):
    answer = client.completions.create(
        model="fake", prompt=[[259, 264, 70], [259, 5]], echo=True, logprobs=1, max_tokens=2, n=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    first = answer.choices[0].logprobs
    assert len(first.tokens) == len(first.token_logprobs) == len(first.text_offset) == 5
    assert first.token_logprobs[0] is None
    assert answer.usage.total_tokens == 9


def test_stream_with_usage(client):
    stream = client.completions.create(
        model="fake",
        prompt="the cat",
        stream=True,
        echo=True,
        logprobs=2,
        max_tokens=3,
        seed=1,
        temperature=0,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "the caton the cat"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3


def test_extra_parameters(client):
    answer = client.completions.create(
        model="fake", prompt="the", max_tokens=1, extra_body={"top_k": 5, "ignore_eos": True}
    )
    assert answer.choices[0].text == "on"


def test_errors_have_the_clients_types(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="the")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="fake", prompt="the", max_tokens=1000)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="fake", input="hi")
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_structured_completion(client):
    answer = client.completions.create(
        model="fake", prompt="the", max_tokens=30, extra_body={"structured_outputs": {"regex": "on{3}"}}
    )
    assert answer.choices[0].text == "onnn"
    assert answer.system_fingerprint


class TestChat:
    def test_answer(self, client):
        answer = client.chat.completions.create(
            model="fake", messages=HELLO, max_completion_tokens=2, logprobs=True, top_logprobs=3, n=2
        )
        assert [choice.message.content for choice in answer.choices] == ["on the"] * 2
        assert answer.choices[0].message.role == "assistant"
        first = answer.choices[0].logprobs.content[0]
        assert first.token == "on"
        assert len(first.top_logprobs) == 3
        assert answer.usage.completion_tokens == 4
        assert answer.usage.prompt_tokens_details.cached_tokens == 1

    def test_stream(self, client):
        stream = client.chat.completions.create(
            model="fake",
            messages=HELLO,
            max_tokens=3,
            stream=True,
            logprobs=True,
            stream_options={"include_usage": True},
        )
        opening, *chunks, last = list(stream)
        assert opening.choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "on the cat"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert last.choices == []
        assert last.usage.completion_tokens == 3

    def test_stream_helper(self, client):
        with client.chat.completions.stream(model="fake", messages=HELLO, stop=" cat") as stream:
            kinds = {event.type for event in stream}
            answer = stream.get_final_completion()
        assert "content.delta" in kinds
        assert answer.choices[0].message.content == "on the"

    def test_response_format(self, client):
        answer = client.chat.completions.create(
            model="fake",
            messages=HELLO,
            max_tokens=20,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "empty", "schema": SCHEMA, "strict": True},
            },
        )
        assert answer.choices[0].message.content == "{}"
        assert answer.choices[0].finish_reason == "stop"

    def test_content_in_parts(self, client):
        messages = [{"role": "user", "content": [{"type": "text", "text": "the"}]}]
        answer = client.chat.completions.create(model="fake", messages=messages, max_tokens=1)
        assert answer.choices[0].message.content == "on"

    def test_tools_are_refused(self, client):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="fake", messages=HELLO, tools=[tool])
        assert refused.value.param == "tools"
        assert refused.value.code == "unsupported_parameter"


@pytest.fixture
def serve():
    """Return a function that serves an engine, and clients that close with the test."""
    with ExitStack() as stack:

        def start(engine, **options):
            server = make_server(create_app(engine, ServerSettings(access_log=False)))
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            return stack.enter_context(openai.OpenAI(base_url=url, api_key="any", **options))

        yield start


def test_client_waits_and_tries_again_when_the_queue_is_full(serve, monkeypatch):
    engine = FakeEngine()
    refusals = iter([True, True])
    generate = engine.generate

    async def full_twice(request):
        if next(refusals, False):
            raise QueueFullError("full", retry_after=1)
        async for output in generate(request):
            yield output

    waits = []
    monkeypatch.setattr(engine, "generate", full_twice)
    monkeypatch.setattr("openai._base_client.time.sleep", waits.append)
    client = serve(engine, max_retries=2)
    assert client.completions.create(model="fake", prompt="the", max_tokens=1).choices[0].text == "on"
    assert waits == [1, 1]


def test_full_queue_is_a_rate_limit_to_the_client(serve):
    client = serve(FakeEngine(max_num_queued_reqs=0), max_retries=0)
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="fake", prompt="the")
    assert full.value.response.headers["retry-after"] == "7"


def test_failure_in_a_stream_is_an_error_of_the_client(serve, monkeypatch):
    engine = FakeEngine()
    draw = engine._draw

    def fail_at_third(sampling, place):
        if place == 2:
            raise StepError("the model failed on this request")
        return draw(sampling, place)

    monkeypatch.setattr(engine, "_draw", fail_at_third)
    stream = serve(engine).completions.create(model="fake", prompt="the", stream=True)
    texts = []
    with pytest.raises(openai.APIError, match="the model failed"):
        texts += (chunk.choices[0].text for chunk in stream)
    assert texts in ([], ["on", " the"])


async def test_asynchronous_client_streams_side_by_side(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="k") as client:

        async def run(tokens):
            stream = await client.completions.create(
                model="fake", prompt="the", max_tokens=tokens, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(run, (1, 2, 3, 3)))
    assert texts == ["on", "on the", "on the cat", "on the cat"]
