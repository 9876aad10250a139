"""OpenAI's own client against a real server on a loopback port."""

from __future__ import annotations

import socket
import threading

import openai
import pytest

from dape_server.app import create_app
from dape_server.run import make_server
from dape_server.settings import ServerSettings
from fakes import FakeEngine

pytestmark = pytest.mark.client


@pytest.fixture(scope="module")
def url():
    server = make_server(create_app(FakeEngine(), ServerSettings(api_key=("k",), access_log=False)))
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
