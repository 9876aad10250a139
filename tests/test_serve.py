"""`dape serve` as a process of its own, with a real model behind real HTTP."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config
from models import TEXT, plain_logprobs, write_model

pytestmark = pytest.mark.client
KV_CACHE_MEMORY = "4MiB"  # 256 blocks or more of 16 tokens


class Server:
    """A running `dape serve`."""

    def __init__(self, folder: Path, *options: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "dape_server", "serve", str(folder), "--port", str(port), *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self.log: list[str] = []
        self.listening = threading.Event()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self.listening.wait(120), "".join(self.log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.log.append(line)
                if "Uvicorn running" in line:
                    self.listening.set()
        self.listening.set()

    def post(self, path: str, **body: Any) -> Any:
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name}{{.*}} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def close(self) -> int:
        """End the server, if it still runs, and return its exit code."""
        self.client.close()
        self.process.terminate()
        code = self.process.wait(60)
        self._reader.join()
        return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", max_model_len=2048)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    running = Server(folder, "--kv-cache-memory", KV_CACHE_MEMORY)
    yield running
    assert running.close() == 0, "".join(running.log)


def target_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token but the first."""
    return plain_logprobs(folder, ids[:-1]).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_perplexity_equals_an_independent_computation(server: Server, folder: Path) -> None:
    text = TEXT[0] * 3
    ids = TextTokenizer.load(folder, load_config(folder)).encode(text)
    expected = target_logprobs(folder, ids)
    answer = server.post("/v1/perplexity", input=text, return_token_logprobs=True, lengths=[32, 64, 200])
    [entry] = answer["data"]
    assert entry["token_ids"] == ids
    assert entry["token_logprobs"][0] is None
    assert entry["token_logprobs"][1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert entry["perplexity"] == pytest.approx(math.exp(-float(expected.mean())), rel=1e-4)
    for rung in entry["ladder"]:
        scored = expected[: rung["length"] - 1][-256:]
        assert rung["num_scored"] == len(scored)
        assert rung["nll_sum"] == pytest.approx(-float(scored.sum()), abs=1e-2)
    suffix = server.post("/v1/perplexity", input=ids, lengths=[64], ladder="suffix", score_last=20)
    rung = suffix["data"][0]["ladder"][0]
    assert rung["nll_sum"] == pytest.approx(-float(target_logprobs(folder, ids[-64:])[-20:].sum()), abs=1e-2)


def test_echo_with_logprobs_gives_the_numbers_of_perplexity(server: Server) -> None:
    ids = random.Random(1).choices(range(1, 300), k=90)
    scored = server.post("/v1/perplexity", input=ids, return_token_logprobs=True)["data"][0]["token_logprobs"]
    [choice] = server.post("/v1/completions", prompt=ids, echo=True, logprobs=1, max_tokens=0)["choices"]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(scored[1:], abs=1e-4)
    [choice] = server.post("/v1/completions", prompt=ids, echo=True, logprobs=1, max_tokens=1)["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["top_logprobs"]) == 91


def test_the_openai_client_streams_what_it_gets_at_once(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="unused", max_retries=0)
    model = client.models.list().data[0].id
    settings: dict[str, Any] = {"model": model, "prompt": TEXT[0][:40], "max_tokens": 30, "seed": 5}
    whole = client.completions.create(**settings)
    stream = client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=model, prompt="x", max_tokens=5000)
    client.close()


def test_clients_that_hang_up_leave_nothing_behind(server: Server) -> None:
    chance = random.Random(3)

    def visit(seed: int) -> None:
        body = {
            "prompt": random.Random(seed).choices(range(1, 300), k=400),
            "max_tokens": 200,
            "ignore_eos": True,
        }
        with httpx.Client(base_url=server.client.base_url, timeout=60) as client:
            if seed % 2:
                with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                    lines = response.iter_lines()
                    for _ in range(seed % 5):
                        next(lines, None)
            else:
                with suppress(httpx.TimeoutException):
                    client.post("/v1/completions", json=body, timeout=0.05 + seed / 100)

    before = server.metric("dape:kv_cache_free_blocks")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, chance.sample(range(40), 24)))
    # One more request passes through the queue behind whatever was left of the others.
    server.post("/v1/completions", prompt=[5, 6], max_tokens=2)
    assert server.metric("dape:num_requests_running") == server.metric("dape:num_requests_waiting") == 0
    assert server.metric("dape:kv_cache_free_blocks") == before


def test_status_routes_answer_while_a_long_text_is_scored(server: Server) -> None:
    ids = random.Random(7).choices(range(1, 300), k=2048)
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(server.post, "/v1/perplexity", input=ids)
        answers = [
            server.client.get(path).status_code for path in ("/health", "/ready", "/version", "/metrics")
        ]
        assert scoring.result()["data"][0]["num_scored"] == 2047
    assert answers == [200] * 4


def test_sigterm_finishes_a_running_stream_and_refuses_new_work(folder: Path) -> None:
    server = Server(folder, "--kv-cache-memory", KV_CACHE_MEMORY)
    body = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        with httpx.Client(base_url=server.client.base_url, timeout=30) as other:
            assert other.get("/ready").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            while other.get("/ready").status_code == 200:
                pass
            refused = other.post("/v1/completions", json={"prompt": "x"})
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
    assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
    assert server.close() == 0
