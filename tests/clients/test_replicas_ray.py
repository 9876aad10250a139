"""`dape serve --replicas 2` as a process of its own, with a real Ray: answers, faults, restarts, the end."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dape_engine.request import SamplingParams
from dape_server.load.process import running
from engines import engine_of, generate
from models import write_model
from processes import descendants, living, title

pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]
KEY = "secret"
COMPLETIONS = "/v1/completions"
PATIENCE = 60
REPLICA = "ray::ServeReplica:dape"
CROWD = 16


@dataclass(frozen=True)
class Served:
    """A running server and the folder of its model."""

    url: str
    pid: int
    folder: Path

    @property
    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        return sorted(pid for pid in descendants(self.pid) if title(pid).startswith(REPLICA))

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url,
            timeout=PATIENCE,
            headers={"Authorization": f"Bearer {KEY}"},
            limits=httpx.Limits(max_connections=None),
        )

    def samples(self) -> dict[tuple[str, str, str], float]:
        """Values of /metrics by name, engine and reason of finish."""
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        families = list(text_string_to_metric_families(text))
        assert len({family.name for family in families}) == len(families)
        return {
            (
                sample.name,
                sample.labels.get("engine", ""),
                sample.labels.get("finished_reason", ""),
            ): sample.value
            for family in families
            for sample in family.samples
        }

    def total(self, name: str, reason: str = "") -> float:
        return sum(value for key, value in self.samples().items() if key[0] == name and key[2] == reason)

    def complete(self) -> None:
        """Wait until there are two replicas, and reports of both."""
        wait_for(lambda: len(self.replicas) == 2)
        wait_for(lambda: self.total("dape:replicas") == 2)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for what another process brings about."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", max_model_len=2048)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dape_server", "serve", str(folder), "--port", str(port)]
    options = ["--replicas", "2", "--kv-cache-memory", "8MiB", "--threads", "1", "--max-body-size", "4096"]
    before = set(Path("/dev/shm").iterdir())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DAPE_API_KEY": KEY}
    with running("dape", [*command, *options], port, "/health", environment) as (url, pid):
        found = Served(url, pid, folder)
        wait_for(lambda: len(found.replicas) == 2)
        yield found
        family = descendants(pid)
    assert not living([pid])
    wait_for(lambda: not living(family))
    assert set(Path("/dev/shm").iterdir()) <= before


def text(number: int, max_tokens: int = 250) -> dict[str, Any]:
    """A request for a long text, greedy or not, streamed or not."""
    return {
        "prompt": f"It was the age of {number}, it was the worst of times",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": number % 2 == 0,
        **({"temperature": 0} if number % 4 < 2 else {"temperature": 0.9, "seed": number}),
    }


class Crowd:
    """Requests side by side, half of them streams; their answers must be whole."""

    def __init__(self, client: httpx.AsyncClient, count: int = CROWD, max_tokens: int = 250):
        self._client = client
        self._waiting = count // 2
        self._begun = asyncio.Event()
        self._answers = asyncio.gather(*(self._ask(text(number, max_tokens)) for number in range(count)))

    async def begun(self) -> None:
        """Wait until every stream has begun."""
        async with asyncio.timeout(PATIENCE):
            await self._begun.wait()

    async def answers(self) -> list[str]:
        """Return the texts."""
        return await self._answers

    async def _ask(self, body: dict[str, Any]) -> str:
        if not body["stream"]:
            answer = await self._client.post(COMPLETIONS, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]
        events: list[str] = []
        async with self._client.stream("POST", COMPLETIONS, json=body) as stream:
            async for line in stream.aiter_lines():
                if not line.startswith("data: "):
                    continue
                events.append(line.removeprefix("data: "))
                if len(events) == 1:
                    self._waiting -= 1
                if not self._waiting:
                    self._begun.set()
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert not any("error" in chunk for chunk in chunks), chunks[-1]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)


async def test_the_answers_are_those_of_one_engine(served: Served) -> None:
    ids = [random.Random(1).randrange(1, 300) for _ in range(40)]
    sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    async with engine_of(served.folder) as engine:
        expected = [
            token for output in await generate(engine, tuple(ids), sampling) for token in output.token_ids
        ]
    async with served.client() as client:
        body = {
            "prompt": ids,
            "max_tokens": 20,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = (await client.post(COMPLETIONS, json={**body, "return_token_ids": True})).json()
        assert answer["choices"][0]["token_ids"] == expected
        scored = (await client.post("/v1/perplexity", json={"input": ids, "window": "full"})).json()
        assert scored["corpus"]["num_scored"] == 39
        bias = (await client.post("/v1/attention_bias", json={"input": ids, "layers": [0]})).json()
        assert bias["query"] == 39
        chosen = {"prompt": "It", "structured_outputs": {"choice": ["best", "worst"]}}
        assert (await client.post(COMPLETIONS, json=chosen)).json()["choices"][0]["text"] in ("best", "worst")


async def test_refusals_keep_their_status_and_form(served: Served) -> None:
    cases = [
        ({"prompt": "a", "max_tokens": 9999}, 400, "context_length_exceeded"),
        ({"prompt": [999]}, 400, "invalid_value"),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, 400, None),
        ({"prompt": "a" * 5000}, 413, "body_too_large"),
    ]
    async with served.client() as client:
        for body, status, code in cases:
            answer = await client.post(COMPLETIONS, json=body)
            error = answer.json()["error"]
            assert answer.status_code == status, error
            assert code is None or error["code"] == code
        client.headers.pop("Authorization")
        assert (await client.post(COMPLETIONS, json={"prompt": "a"})).status_code == 401


async def test_equal_beginnings_meet_in_one_cache(served: Served) -> None:
    async with served.client() as client:
        for seed in range(8):
            start = [random.Random(100 + seed).randrange(1, 300) for _ in range(64)]
            cached = []
            for end in range(1, 4):
                answer = await client.post(COMPLETIONS, json={"prompt": [*start, end], "max_tokens": 1})
                cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
            # By chance, one of two replicas would have them in one case of 4, and all eight in one of 65536.
            assert cached == [0, 64, 64]
    wait_for(lambda: served.total("dape:prefix_cache_hits_total") >= 8 * 2 * 64)


async def test_a_client_that_leaves_ends_its_work(served: Served) -> None:
    aborted = served.total("dape:request_success_total", "abort")
    async with served.client() as client, client.stream("POST", COMPLETIONS, json=text(0, 1900)) as stream:
        async for _ in stream.aiter_lines():
            break
    wait_for(lambda: served.total("dape:request_success_total", "abort") == aborted + 1)
    wait_for(lambda: served.total("dape:num_requests_running") == 0)


async def test_a_burst_kills_no_replica(served: Served) -> None:
    before = served.replicas
    async with served.client() as client:
        bodies = [{"prompt": [number % 300, 5, 7], "max_tokens": 4} for number in range(300)]
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))
        assert {answer.status_code for answer in answers} <= {200, 429}
        assert sum(answer.status_code == 200 for answer in answers) >= 2 * 32
    assert served.replicas == before


async def test_a_replica_killed_under_load_costs_no_request(served: Served) -> None:
    async with served.client() as client:
        expected = await Crowd(client).answers()
        moved = served.total("dape:requests_moved_total")
        crowd = Crowd(client)
        await crowd.begun()
        os.kill(served.replicas[0], signal.SIGKILL)
        assert await crowd.answers() == expected
        assert served.total("dape:requests_moved_total") > moved
        served.complete()


async def test_with_all_replicas_killed_requests_wait_for_new_ones(served: Served) -> None:
    async with served.client() as client:
        expected = await Crowd(client, 4, 1500).answers()
        moved = served.total("dape:requests_moved_total")
        crowd = Crowd(client, 4, 1500)
        await crowd.begun()
        for pid in served.replicas:
            os.kill(pid, signal.SIGKILL)
        assert await crowd.answers() == expected
        assert served.total("dape:requests_moved_total") >= moved + 4
        assert (await client.get("/health")).status_code == 200
        served.complete()


async def test_a_rolling_restart_loses_nothing(served: Served) -> None:
    old = served.replicas
    async with served.client() as client:
        expected = await Crowd(client).answers()
        os.kill(served.pid, signal.SIGHUP)
        rounds = 0
        while living(old):
            assert await Crowd(client).answers() == expected
            rounds += 1
        assert rounds > 1
        assert await Crowd(client).answers() == expected
    served.complete()
    assert not set(old) & set(served.replicas)


def test_one_metrics_page_for_all(served: Served) -> None:
    served.complete()
    samples = served.samples()
    engines = {engine for name, engine, _ in samples if name == "dape:num_requests_running"}
    assert len(engines) == 2
    assert {engine for name, engine, _ in samples if name == "dape:generation_tokens_total"} == engines
    assert {engine for name, engine, _ in samples if name == "process_resident_memory_bytes"} == {
        "",
        *engines,
    }


def test_the_example(served: Served) -> None:
    script = Path(__file__).parents[2] / "examples/replicas.py"
    command = [sys.executable, str(script), "--base-url", served.url, "--api-key", KEY]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert len(re.findall(r"^the \w+, [\w ]+: \d+ of \d+ tokens were cached$", shown, re.MULTILINE)) == 9
    assert len(re.findall(r"^replica \d: tokens read \d+, ", shown, re.MULTILINE)) == 2
