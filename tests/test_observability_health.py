"""/health tells the truth soon, answers fast while the machine is busy, and on a port of its own."""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import httpx
import pytest

from dape_engine.engine import AsyncEngine
from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_server.app import create_app
from dape_server.run import make_server
from dape_server.settings import ServerSettings
from fakes import COMPLETIONS, FakeEngine, serving
from models import write_model

BODY = {"prompt": "It was", "max_tokens": 4}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds):
    """Ask again and again; fail when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline


@contextmanager
def running(engine, **settings):
    """Serve from a thread; yield a client and the server."""
    server = make_server(create_app(engine, ServerSettings(access_log=False, **settings)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=20) as client:
                until(lambda: client.get("/ready").status_code == 200, 20)
                yield client, server
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture
def engine(tmp_path):
    return AsyncEngine(write_model(tmp_path / "tiny"), EngineOptions(kv_cache_memory="1MiB", device="cpu"))


def test_dead_engine_shows_within_a_second(engine, monkeypatch):
    def die(*_):
        raise SystemExit

    with running(engine) as (client, _):
        assert client.post(COMPLETIONS, json=BODY).status_code == 200
        monkeypatch.setattr(engine._runner, "run", die)
        answer = client.post(COMPLETIONS, json=BODY)
        assert answer.json()["error"]["code"] == "engine_stopped"
        until(lambda: client.get("/health").status_code == 503, 1)
        assert client.get("/health").json()["error"]["code"] == "unhealthy"
        assert client.get("/ready").status_code == 503
        assert "dape:engine_healthy" in client.get("/metrics").text
        assert 'dape:engine_healthy{engine="0",model_name="tiny"} 0.0' in client.get("/metrics").text


def test_stuck_step_shows_after_the_timeout_and_passes(engine, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    run = engine._runner.run

    def stuck(*arguments):
        begun.set()
        assert go_on.wait(20)
        return run(*arguments)

    monkeypatch.setattr(engine._runner, "run", stuck)
    with running(engine, health_timeout=0.2) as (client, _), ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.post, COMPLETIONS, json=BODY)
        assert begun.wait(20)
        until(lambda: client.get("/health").status_code == 503, 5)
        assert "no step has ended" in client.get("/health").json()["error"]["message"]
        go_on.set()
        assert request.result().status_code == 200
        assert client.get("/health").status_code == 200


class TestPort:
    def test_it_needs_no_key_and_has_no_other_route(self):
        port = free_port()
        with (
            serving(api_key=("k",), health_port=port),
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
        ):
            assert client.get("/health").json() == {"status": "ok"}
            assert client.get("/ready").status_code == 200
            for path in ("/metrics", "/version", "/openapi.json", "/docs", "/v1/models"):
                assert client.get(path).status_code == 404
        with socket.create_server(("127.0.0.1", port)):
            pass  # the port is free again

    def test_it_tells_what_the_main_port_tells(self):
        port = free_port()
        with serving(health_port=port) as main:
            url = f"http://127.0.0.1:{port}"
            main.app.state.context.lifecycle.drain()
            assert httpx.get(f"{url}/ready").status_code == 503
            assert httpx.get(f"{url}/health").status_code == 200
            main.engine.failure = "the engine has failed"
            assert httpx.get(f"{url}/health").status_code == 503

    def test_it_answers_while_the_event_loop_does_not_and_says_so(self):
        port, go_on = free_port(), threading.Event()
        with running(FakeEngine(), health_port=port, health_timeout=0.3) as (_, server):
            url = f"http://127.0.0.1:{port}/health"
            assert httpx.get(url).status_code == 200
            server._loop.call_soon_threadsafe(go_on.wait, 20)
            try:
                assert httpx.get(url).status_code == 200
                until(lambda: httpx.get(url).status_code == 503, 5)
                assert "event loop" in httpx.get(url).json()["error"]["message"]
            finally:
                go_on.set()
            until(lambda: httpx.get(url).status_code == 200, 5)

    def test_taken_port_is_a_settings_error(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(SettingsError, match=f"--health-port {port}: cannot listen"):
                create_app(FakeEngine(), ServerSettings(health_port=port))


@pytest.mark.client
def test_it_answers_in_time_while_16k_tokens_are_read_and_10_mb_tokenised(tmp_path):
    """A server of its own process: the probes must not share its interpreter.

    The median of the probes is judged: the machine may be busy with more than this test. A server that
    reads or tokenises in its event loop misses it by far.
    """
    folder = write_model(tmp_path / "tiny", max_model_len=1 << 15)
    port, health_port = free_port(), free_port()
    options = ["--port", str(port), "--health-port", str(health_port), "--no-access-log"]
    command = [sys.executable, "-m", "dape_server", "serve", str(folder), *options]
    draw = random.Random(0)
    letters = "etaoin shrdlu "
    word = "".join(draw.choice(letters) for _ in range(10_000))
    text = (word * 1000)[: 10 * 10**6]
    ids = [draw.randrange(1, 300) for _ in range(1 << 14)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ)) as process:
        try:
            main = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
            own = httpx.Client(base_url=f"http://127.0.0.1:{health_port}", timeout=120)
            with main, own, ThreadPoolExecutor(2) as pool:
                until(lambda: answers(main), 60)
                work = [
                    pool.submit(main.post, "/tokenize", content=as_json(prompt=text), headers=JSON),
                    pool.submit(main.post, "/v1/perplexity", content=as_json(input=ids), headers=JSON),
                ]
                seconds = {main: [], own: []}
                while not wait(work[:1], timeout=0.01).done:
                    for client, taken in seconds.items():
                        begun = time.perf_counter()
                        assert client.get("/health").status_code == 200
                        taken.append(time.perf_counter() - begun)
                tokenised, scored = (job.result() for job in work)
        finally:
            process.terminate()
    assert tokenised.status_code == scored.status_code == 200
    assert tokenised.json()["count"] > 10**6
    for taken in seconds.values():
        assert len(taken) >= 10
        assert statistics.median(taken) < 0.05


JSON = {"content-type": "application/json"}


def as_json(**fields):
    return json.dumps(fields)


def answers(client):
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False
