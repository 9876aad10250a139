"""Storms: crowds of clients that come, ask and leave. Blocks, memory, files and threads come back."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from dape_engine.options import EngineOptions
from engines import HttpEngine
from fakes import COMPLETIONS, PERPLEXITY, FakeEngine
from live import live, request, until
from models import write_model

CLIENTS = 40
"""At any time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def anonymous_memory() -> int:
    """Return the bytes of memory that belong to this process alone, swapped out or not."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return sum(int(values[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap"))


def body_of(chance: random.Random) -> tuple[str, dict[str, Any]]:
    ids = chance.choices(range(1, 300), k=chance.choice([1, 20, 200, 400]))
    if chance.random() < 0.3:
        return PERPLEXITY, {"input": [*ids, 5], "window": "sliding", "context_length": 64, "stride": 32}
    extra = {"stream": chance.random() < 0.5, "n": chance.choice([1, 1, 3]), "echo": chance.random() < 0.2}
    return COMPLETIONS, {"prompt": ids, "max_tokens": 100, "ignore_eos": True, **extra}


async def visit(server: Any, chance: random.Random) -> None:
    """Ask for something and leave at a random moment: within the body, in the queue, in the answer."""
    wire = await server.connect()
    path, body = body_of(chance)
    content = request("POST", path, json.dumps(body).encode())
    cut = chance.randrange(len(content)) if chance.random() < 0.2 else len(content)
    await wire.send(content[:cut])
    if cut == len(content):
        for _ in range(chance.randrange(4)):
            reading = asyncio.ensure_future(wire.reader.read(200))
            await asyncio.wait({reading}, timeout=chance.random() / 20)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    wire.leave(politely=chance.random() < 0.5)


async def storm(server: Any, visits: int, seed: int) -> None:
    chance = random.Random(seed)
    turns = asyncio.Semaphore(CLIENTS)

    async def one(number: int) -> None:
        async with turns:
            await visit(server, random.Random(number))

    await asyncio.gather(*(one(chance.randrange(1 << 30)) for _ in range(visits)))
    await until(lambda: not server.engine.active and not server.server.server_state.connections)


def unpooled_threads() -> list[str]:
    """The threads that belong to no pool: the pools are bounded, and grow to their bounds when they like."""
    pooled = ("asyncio_", "AnyIO worker")
    return sorted(t.name for t in threading.enumerate() if not t.name.startswith(pooled))


async def test_two_thousand_aborted_requests_leave_nothing_behind(folder: Path) -> None:
    options = EngineOptions(kv_cache_memory=1 << 20, block_size=4, max_num_batched_tokens=64)
    engine = HttpEngine(folder, options)
    async with live(engine) as server:
        await storm(server, 500, seed=1)  # caches and pools are full from here on
        files, threads, memory = open_files(), unpooled_threads(), anonymous_memory()
        for seed in (2, 3, 4):
            await storm(server, 500, seed=seed)
            assert engine.free_blocks == engine.num_blocks
            assert open_files() <= files
        assert unpooled_threads() <= threads
        grown = anonymous_memory() - memory
        assert grown < 1500 * 8192, f"{grown / 1500:.0f} bytes a request"
        await server.check_serving()
    engine._scheduler.check_invariants()


async def test_a_thousand_connections_at_once() -> None:
    files = open_files()
    engine = FakeEngine()
    async with live(engine, max_connections=600) as server:
        wires = await asyncio.gather(*(server.connect() for _ in range(1000)))
        body = json.dumps({"prompt": "the cat", "max_tokens": 3}).encode()

        async def ask(wire: Any) -> int:
            await wire.send(request("POST", COMPLETIONS, body))
            return (await wire.answer()).status

        statuses = await asyncio.gather(*(ask(wire) for wire in wires))
        # Those above the limit, and of the others those above the engine's queue, are told to come back.
        assert set(statuses) <= {200, 429, 503}
        assert statuses.count(503) == 400
        assert statuses.count(200) >= engine.limit
        server.close()
        await until(lambda: not server.server.server_state.connections)
        await server.check_serving()
    gc.collect()
    assert open_files() <= files + 3


@pytest.mark.parametrize("kind", ["same prompts", "all of the greatest length"])
async def test_many_requests_that_stay_are_all_answered(folder: Path, kind: str) -> None:
    engine = HttpEngine(folder, EngineOptions(kv_cache_memory=1 << 20, block_size=4))
    longest = engine.max_model_len
    ids = list(range(5, 25)) if kind == "same prompts" else [7] * (longest - 2)
    body = json.dumps({"prompt": ids, "max_tokens": 2, "temperature": 0, "ignore_eos": True}).encode()
    async with live(engine) as server:
        answers = await asyncio.gather(*(server.ask(request("POST", COMPLETIONS, body)) for _ in range(60)))
        assert [answer.status for answer in answers] == [200] * 60
        texts = {json.loads(answer.body)["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        await server.check_serving()
