"""Clients that leave: the engine's work for them ends at once, and nobody else notices.

The application is driven by hand, one ASGI message after the other, so that a client can leave at any
point.
"""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import asynccontextmanager

import pytest

from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_server.app import create_app
from dape_server.settings import ServerSettings
from fakes import COMPLETIONS, PERPLEXITY, FakeEngine, events
from models import write_model

IDS = [259, 264, 70, 71, 259, 80, 81, 264]


class Client:
    """One request and what came back of it."""

    def __init__(self, app, path, body, *, cut_off=False):
        content = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        self.received = b""
        self.status = None
        self.reads = asyncio.Event()
        self.reads.set()
        self._incoming = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": content, "more_body": cut_off})
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message):
        await self.reads.wait()
        self.status = message.get("status", self.status)
        self.received += message.get("body", b"")

    def leave(self):
        self._incoming.put_nowait({"type": "http.disconnect"})


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


@asynccontextmanager
async def running(engine):
    app = create_app(engine, ServerSettings())
    async with app.router.lifespan_context(app):
        yield app


def check_nothing_left(engine, requests):
    assert engine.active == {}
    assert engine.free_blocks == engine.num_blocks
    assert len(engine.aborted) == requests


BODIES = [
    pytest.param(COMPLETIONS, {"prompt": IDS, "max_tokens": 8}, 1, id="completion"),
    pytest.param(COMPLETIONS, {"prompt": [IDS, IDS], "n": 3, "max_tokens": 8}, 6, id="six completions"),
    pytest.param(COMPLETIONS, {"prompt": "the cat", "echo": True, "logprobs": 2}, 1, id="echo"),
    pytest.param(PERPLEXITY, {"input": IDS, "window": "sliding", "context_length": 3}, 1, id="perplexity"),
    pytest.param(
        PERPLEXITY, {"input": [IDS] * 9, "window": "sliding", "context_length": 3}, 4, id="nine inputs"
    ),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body", "at_work"), BODIES)
async def test_leaving_before_the_first_result(path, body, at_work, stream):
    engine = FakeEngine()
    async with running(engine) as app:
        engine.gate.clear()
        client = Client(app, path, {**body, "stream": stream})
        await until(lambda: len(engine.active) == at_work)
        client.leave()
        await client.task
        check_nothing_left(engine, at_work)
        assert client.status is None
        assert engine.steps == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body", "at_work"), BODIES)
async def test_leaving_between_two_results(path, body, at_work, stream):
    engine = FakeEngine()
    async with running(engine) as app:
        client = Client(app, path, {**body, "stream": stream})
        await until(lambda: engine.steps == at_work)
        engine.gate.clear()
        client.leave()
        await client.task
        check_nothing_left(engine, at_work)
        assert b"[DONE]" not in client.received


async def test_leaving_while_the_stream_waits_for_the_reader():
    engine = FakeEngine()
    async with running(engine) as app:
        client = Client(app, COMPLETIONS, {"prompt": IDS, "stream": True})
        await until(lambda: client.received)
        client.reads.clear()
        client.leave()
        await client.task
        check_nothing_left(engine, len(engine.aborted))


async def test_leaving_during_tokenisation(monkeypatch):
    engine = FakeEngine()
    begun, go_on = threading.Event(), threading.Event()
    encode = engine.tokenizer.encode_pieces

    def slow(*args, **kwargs):
        begun.set()
        assert go_on.wait(20)
        return encode(*args, **kwargs)

    async with running(engine) as app:
        monkeypatch.setattr(engine.tokenizer, "encode_pieces", slow)
        client = Client(app, COMPLETIONS, {"prompt": "the cat"})
        await until(begun.is_set)
        client.leave()
        go_on.set()
        await client.task
        check_nothing_left(engine, len(engine.requests))
        assert client.status is None


async def test_leaving_within_the_body():
    engine = FakeEngine()
    async with running(engine) as app:
        client = Client(app, COMPLETIONS, {"prompt": "the cat"}, cut_off=True)
        client.leave()
        await client.task
        assert engine.requests == []
        assert client.status is None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_others_do_not_notice(stream):
    body = {"prompt": "the cat", "max_tokens": 12, "stream": stream, "logprobs": 1}
    alone = FakeEngine()
    async with running(alone) as app:
        undisturbed = Client(app, COMPLETIONS, body)
        await undisturbed.task
    engine = FakeEngine()
    async with running(engine) as app:
        stays = Client(app, COMPLETIONS, body)
        leaving = [Client(app, case.values[0], {**case.values[1], "stream": stream}) for case in BODIES]
        for number, client in enumerate(leaving):
            await until(lambda steps=3 * number: engine.steps >= steps)
            client.leave()
        await asyncio.gather(stays.task, *(client.task for client in leaving))
        assert engine.active == {}

    assert choices(stays, stream) == choices(undisturbed, stream)


def choices(client, stream):
    text = client.received.decode()
    return [answer["choices"] for answer in (events(text) if stream else [json.loads(text)])]


async def test_leaving_ends_a_long_scoring_between_two_chunks(tmp_path):
    folder = write_model(tmp_path / "tiny")
    engine = AsyncEngine(folder, EngineOptions(kv_cache_memory=1 << 20, max_num_batched_tokens=32))
    async with running(engine) as app:
        body = {"input": [list(range(1, 280))] * 40, "window": "sliding", "context_length": 200, "stride": 20}
        client = Client(app, PERPLEXITY, body)
        await until(lambda: engine.state().steps >= 3)
        client.leave()
        await client.task
        await until(lambda: engine.state().running + engine.state().waiting == 0)
        steps = engine.state().steps
        # A window of 200 tokens takes 7 steps, the whole request thousands of tokens.
        assert steps < 40 * 279 // 32
        assert engine.state().free_blocks == engine.state().total_blocks
        assert client.status is None
        other = Client(app, PERPLEXITY, {"input": [*IDS[:2], 5, 6]})
        await other.task
        assert other.status == 200


async def test_a_client_that_stays_is_not_aborted():
    engine = FakeEngine()
    async with running(engine) as app:
        client = Client(app, COMPLETIONS, {"prompt": IDS, "stream": True})
        await client.task
        assert client.received.endswith(b"data: [DONE]\n\n")
        check_nothing_left(engine, 0)


async def test_leaving_is_counted():
    engine = FakeEngine()
    async with running(engine) as app:
        engine.gate.clear()
        client = Client(app, COMPLETIONS, {"prompt": IDS})
        await until(lambda: engine.active)
        client.leave()
        await client.task
        metrics = app.state.context.metrics.exposition().decode()
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="499"} 1.0' in metrics
