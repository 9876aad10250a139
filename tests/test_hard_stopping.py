"""Signals to a real process in every state of its life, and what its clients see.

The states of a server that runs are tested on a fake engine in test_http_run.py; here the process itself
loads, dies, or comes back.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from dape_server.run import FLUSH_SECONDS
from models import write_model
from test_serve import Server

pytestmark = pytest.mark.client
SMALL = ("--kv-cache-memory", "4MiB")
SECONDS = 60
LONG = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", max_model_len=2048)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("until", ["", "attention"], ids=["at once", "after loading"])
def test_a_signal_before_the_first_request_ends_the_process(
    folder: Path, number: signal.Signals, until: str
) -> None:
    command = [sys.executable, "-m", "dape_server", "serve", str(folder), "--port", "0", *SMALL]
    # Where the tests run in the background of a shell, they ignore SIGINT, and so would their children.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default) as process:
        assert process.stderr is not None
        while until and until not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        try:
            code = process.wait(SECONDS)
        finally:
            process.kill()
        rest = process.stderr.read()
    # Before it serves, a process has nothing to finish: the signal may end it as it ends any other.
    assert code in (0, 1, 130, -number), rest
    if number == signal.SIGTERM:
        assert "Traceback" not in rest


def test_a_killed_server_is_seen_by_its_clients_and_can_be_started_again(folder: Path) -> None:
    server = Server(folder, *SMALL)
    port = str(server.client.base_url.port)
    with server.client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.kill()
        with pytest.raises(httpx.TransportError):
            list(lines)
    assert server.close() == -signal.SIGKILL
    again = Server(folder, *SMALL, "--port", port)
    body: dict[str, Any] = {"prompt": [5], "max_tokens": 2}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
        assert client.post("/v1/completions", json=body).status_code == 200
    assert again.close() == 0


@pytest.mark.parametrize(("patience", "ends"), [(SECONDS, "length"), (0, "engine_stopped")])
def test_a_signal_in_the_prefill_of_a_long_prompt(tmp_path: Path, patience: int, ends: str) -> None:
    """The drain finishes the prompt where there is time, and where there is none its client is told."""
    folder = write_model(tmp_path / "long", max_model_len=16_500)
    options = ("--kv-cache-memory", "16MiB", "--max-num-batched-tokens", "256")
    server = Server(folder, *options, "--shutdown-timeout", str(patience))
    body = {"prompt": [*range(5, 261)] * 64, "max_tokens": 2, "ignore_eos": True, "stream": True}
    with server.client.stream(
        "POST", "/v1/completions", json={**body, "return_progress": True}, timeout=SECONDS
    ) as response:
        lines = (line for line in response.iter_lines() if line)
        progress = json.loads(next(lines).removeprefix("data: "))["prompt_progress"]
        assert progress["processed"] < progress["total"] == 16_384
        begun = time.monotonic()
        server.process.terminate()
        rest = list(lines)
    assert f'"{ends}"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert server.close() == 0
    assert time.monotonic() - begun < patience + FLUSH_SECONDS
    assert "Traceback" not in "".join(server.log)


def test_a_client_that_leaves_during_the_drain_holds_nothing_up(folder: Path) -> None:
    server = Server(folder, *SMALL, "--shutdown-timeout", str(SECONDS))
    with server.client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        # What comes now was made after the signal, or is the end of a text that was soon done.
        next(lines, "")
    assert server.process.wait(SECONDS) == 0
    assert server.close() == 0
    assert "Traceback" not in "".join(server.log)


def test_a_second_signal_ends_a_long_drain(folder: Path) -> None:
    server = Server(folder, *SMALL, "--shutdown-timeout", "600", "--max-num-batched-tokens", "64")
    # Half a million tokens to be read, chunk by chunk: nothing may wait for their end.
    body = {"input": list(range(5, 255)) * 12, "window": "sliding", "context_length": 2000, "stride": 4}
    with server.client.stream("POST", "/v1/perplexity", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        while server.client.get("/ready").status_code == 200:
            pass
        server.process.terminate()
        rest = [line for line in lines if line]
    assert '"engine_stopped"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert server.close() == 0
    assert "Traceback" not in "".join(server.log)
