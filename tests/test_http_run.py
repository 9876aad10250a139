"""A server on a socket: a client that hangs up, and signals, which drain, then abort, and exit quietly.

uvicorn would raise a caught signal again after its end; a server that did so would end this test run.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from contextlib import asynccontextmanager

import httpx2
import pytest

from dape_server.app import create_app
from dape_server.run import make_server
from dape_server.settings import ServerSettings
from fakes import FakeEngine, events

BODY = {"prompt": "the cat", "max_tokens": 4}


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def serving(engine, **settings):
    """Serve on a free loopback port; yield a client and the server's task."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = make_server(create_app(engine, ServerSettings(access_log=False, **settings)))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx2.AsyncClient(base_url=url, timeout=20) as client, asyncio.timeout(30):
            while not server.started:
                await asyncio.sleep(0.01)
            yield client, task
            await task
    assert engine.stopped
    assert engine.active == {}


@asynccontextmanager
async def held_request(client, engine, **extra):
    """Send a request that the engine holds before its first token."""
    engine.gate.clear()
    request = asyncio.create_task(client.post("/v1/completions", json={**BODY, **extra}))
    while not engine.active:
        await asyncio.sleep(0.01)
    yield request


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_ends_the_work(stream):
    engine = FakeEngine()
    async with serving(engine) as (client, _), held_request(client, engine, n=3, stream=stream) as request:
        request.cancel()
        while engine.active:
            await asyncio.sleep(0.01)
        assert len(engine.aborted) == 3
        terminate()


async def draining(client):
    while (await client.get("/ready")).status_code != 503:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_server_stops_at_once(number):
    async with serving(FakeEngine()) as (client, _):
        assert (await client.get("/ready")).status_code == 200
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("stream", [False, True])
async def test_running_request_is_finished_and_new_ones_are_refused(stream):
    engine = FakeEngine()
    async with serving(engine) as (client, task), held_request(client, engine, stream=stream) as request:
        terminate()
        await draining(client)
        assert (await client.get("/health")).status_code == 200
        refused = await client.post("/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert not task.done()
        engine.gate.set()
        answer = await request
        assert answer.status_code == 200
        if stream:
            assert [event["choices"][0]["text"] for event in events(answer.text)] == [
                "on",
                " the",
                " cat",
                "on",
            ]
        else:
            assert answer.json()["choices"][0]["text"] == "on the caton"
    assert engine.aborted == []


async def test_deadline_aborts_what_still_runs():
    engine = FakeEngine()
    async with serving(engine, shutdown_timeout=0.05) as (client, _), held_request(client, engine) as request:
        terminate()
        answer = await request
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_stopped"


async def test_second_signal_aborts_at_once():
    engine = FakeEngine()
    async with serving(engine, shutdown_timeout=3600) as (client, _), held_request(client, engine) as request:
        terminate()
        await draining(client)
        assert not request.done()
        terminate()
        assert (await request).status_code == 503


async def test_abort_in_a_stream_is_said_in_the_stream():
    engine = FakeEngine()
    async with serving(engine, shutdown_timeout=0) as (client, _):
        body = {**BODY, "max_tokens": 60, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            engine.gate.clear()
            terminate()
            rest = [line async for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_stopped"
    assert rest[-1] == "data: [DONE]"
