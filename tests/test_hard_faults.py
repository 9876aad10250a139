"""Faults put into a running engine: one request's fault never ends another, and health tells the truth.

As SQLite's tests do, each operation of a step fails in turn.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from dape_engine.engine import AsyncEngine
from dape_engine.errors import EngineStoppedError, StepError
from dape_engine.options import EngineOptions
from dape_engine.request import GenerationRequest, SamplingParams, ScoreRequest, Window
from engines import SMALL, HttpEngine, engine_of
from fakes import COMPLETIONS
from live import PATIENCE, live, request, until
from models import write_model

DRAWN = SamplingParams(max_tokens=6, temperature=1.0, top_p=0.95, seed=5, ignore_eos=True, logprobs=0)
PROMPTS = [tuple(range(7 * n + 1, 7 * n + 12)) for n in range(3)]
SCORED = tuple(range(200, 230))
POISON = 299
"""A token whose embedding is not a number, in the model of the fixture `poisoned`."""
SECOND = 1.0
"""Within which health has to tell the truth."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "poisoned")
    tensors = load_file(folder / "model.safetensors")
    tensors["word_embeddings.weight"][POISON] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


async def generate(engine: AsyncEngine, prompt: tuple[int, ...], sampling: SamplingParams = DRAWN) -> Any:
    """Return the tokens of a completion and their log-probabilities."""
    request_ = GenerationRequest(f"g{prompt[0]}", prompt, sampling)
    outputs = [output async for output in engine.generate(request_)]
    return (
        [token for output in outputs for token in output.token_ids],
        [entry.logprob for output in outputs for entry in output.logprobs],
    )


async def score(engine: AsyncEngine, ids: tuple[int, ...] = SCORED) -> Any:
    """Return the log-probabilities of a text."""
    windows = (Window(0, len(ids), 1),)
    [scores] = [scores async for scores in engine.score(ScoreRequest("s", ids, windows))]
    return list(scores.logprobs)


async def everything(engine: AsyncEngine) -> list[Any]:
    """Run three completions and a scoring side by side; return results and errors."""
    work = [*(generate(engine, prompt) for prompt in PROMPTS), score(engine)]
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*work, return_exceptions=True)


def check_same(results: list[Any], expected: list[Any]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        if isinstance(wanted, tuple):
            assert result[0] == wanted[0]
            assert result[1] == pytest.approx(wanted[1], abs=1e-4)
        else:
            assert result == pytest.approx(wanted, abs=1e-4)


class FailingOperation(TorchDispatchMode):
    """Fails at one operation of PyTorch; each of them may be the one that finds no memory."""

    def __init__(self, at: int, error: Exception):
        super().__init__()
        self.left = at
        self.error = error

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error
        return function(*args, **(kwargs or {}))


def interpose(engine: AsyncEngine, around: Callable[[Callable[[], Any], list[Any]], Any]) -> None:
    """Have all work of the model pass through `around(work, chunks)`.

    Background work is done in parts; the chunks are known to the first of them only.
    """
    runner = engine._runner

    def through(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def part(*arguments: Any) -> Any:
            chunks = arguments[0] if name in ("run", "begin") else []
            return around(lambda: original(*arguments), chunks)

        return part

    for name in ("run", "begin", "advance", "finish"):
        setattr(runner, name, through(name, getattr(runner, name)))


def check_all_but_one(results: list[Any], expected: list[Any]) -> None:
    """Check that all are right, but for one that may have failed.

    A step of one request is not tried again: there is nobody to be kept from its fault.
    """
    failed = [place for place, result in enumerate(results) if isinstance(result, StepError)]
    assert len(failed) <= 1
    check_same(*([x for place, x in enumerate(all_) if place not in failed] for all_ in (results, expected)))


# --- A step that fails once: nobody notices ------------------------------------------------------


@pytest.mark.parametrize("step", range(8))
async def test_work_that_fails_once_changes_no_answer(folder: Path, step: int) -> None:
    async with engine_of(folder) as engine:
        expected = await everything(engine)
    calls = iter(range(10_000))

    def fail(work: Callable[[], Any], _chunks: Any) -> Any:
        result = work()
        if next(calls) == step:
            # After the work, when cache and random numbers have been touched.
            raise RuntimeError("a passing fault")
        return result

    async with engine_of(folder) as engine:
        interpose(engine, fail)
        check_all_but_one(await everything(engine), expected)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
async def test_memory_that_runs_out_at_any_operation_changes_no_answer(folder: Path, backend: str) -> None:
    """The k-th operation finds no memory, for every third k, until a run has no k-th."""
    async with engine_of(folder, attention_backend=backend, block_size=16) as engine:
        expected = await everything(engine)
    tries, passed = 0, False
    async with engine_of(folder, attention_backend=backend, block_size=16) as engine:
        mode = FailingOperation(0, torch.OutOfMemoryError("no memory"))
        interpose(engine, lambda work, _: _under(mode, work))
        while not passed and tries < 60:
            mode.left = 3 * tries
            check_all_but_one(await everything(engine), expected)
            tries, passed = tries + 1, mode.left >= 0
    assert tries > 20


def _under(mode: FailingOperation, work: Callable[[], Any]) -> Any:
    if mode.left < 0:
        return work()
    with mode:
        return work()


# --- A fault that belongs to one sequence --------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), torch.OutOfMemoryError("x")], ids=repr)
@pytest.mark.parametrize("victim", range(4))
async def test_a_request_that_always_fails_ends_alone(folder: Path, victim: int, error: Exception) -> None:
    async with engine_of(folder) as engine:
        expected = await everything(engine)
    first = [*(prompt[0] for prompt in PROMPTS), SCORED[0]][victim]

    def fail(work: Callable[[], Any], chunks: Any) -> Any:
        if any(chunk.sequence.tokens[0] == first for chunk in chunks):
            raise error
        return work()

    async with engine_of(folder) as engine:
        interpose(engine, fail)
        results = await everything(engine)
        failed = results.pop(victim)
        assert isinstance(failed, StepError)
        assert failed.status == 500
        check_same(results, [wanted for place, wanted in enumerate(expected) if place != victim])


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
async def test_numbers_that_are_no_numbers_end_their_own_request_only(poisoned: Path, backend: str) -> None:
    """Their keys and values stay behind in blocks that others get next, where nothing may read them."""
    async with engine_of(
        poisoned, attention_backend=backend, block_size=16, kv_cache_memory=12 * 16 * 512
    ) as engine:
        expected = await everything(engine)
        for place in (0, 5, 10):
            bad = [*PROMPTS[0][:place], POISON, *PROMPTS[0][place:]]
            bad_generation = generate(engine, tuple(bad))
            bad_scoring = score(engine, (*SCORED[:place], POISON, *SCORED[place:]))
            *failed, results = await asyncio.gather(
                bad_generation, bad_scoring, everything(engine), return_exceptions=True
            )
            assert [type(error) for error in failed] == [StepError, StepError]
            assert all(str(POISON) not in str(error) for error in failed)
            check_same(results, expected)
        check_same(await everything(engine), expected)


@pytest.mark.parametrize("victim", range(3))
async def test_a_tokenizer_that_fails_ends_its_own_request_only(
    folder: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_of(folder) as engine:
        expected = await everything(engine)
    rare = set(expected[victim][0]).difference(
        *(tokens for place, (tokens, _) in enumerate(expected[:3]) if place != victim)
    )
    async with engine_of(folder) as engine:
        token_bytes = engine.tokenizer.token_bytes

        def fail(token: int) -> bytes:
            if token in rare:
                raise ValueError("no such token")
            return token_bytes(token)

        monkeypatch.setattr(engine.tokenizer, "token_bytes", fail)
        monkeypatch.setattr(engine.tokenizer, "decode", _failing_decode(engine.tokenizer.decode, rare))
        results = await everything(engine)
        assert isinstance(results.pop(victim), StepError)
        check_same(results, [wanted for place, wanted in enumerate(expected) if place != victim])


def _failing_decode(decode: Callable[..., str], rare: set[int]) -> Callable[..., str]:
    def failing(tokens: Any, **options: Any) -> str:
        if rare.intersection(tokens):
            raise ValueError("no such token")
        return decode(tokens, **options)

    return failing


async def test_an_observer_that_fails_ends_nothing(folder: Path) -> None:
    class Broken:
        def on_step(self, _stats: object) -> None:
            raise RuntimeError("a metric")

        on_finished = on_step

    async with engine_of(folder, Broken()) as engine:
        results = await everything(engine)
    assert not any(isinstance(result, Exception) for result in results), results


# --- Health --------------------------------------------------------------------------------------


def http_engine(folder: Path) -> HttpEngine:
    return HttpEngine(folder, EngineOptions(**SMALL))


POST = request("POST", COMPLETIONS, b'{"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": true}')
HEALTH = request("GET", "/health")


async def seconds_until_unhealthy(server: Any) -> float:
    begun = time.monotonic()
    while (await server.ask(HEALTH)).status == 200:
        await asyncio.sleep(0.01)
    return time.monotonic() - begun


async def test_health_tells_of_a_dead_engine_within_a_second(folder: Path) -> None:
    engine = http_engine(folder)
    async with live(engine) as server:
        assert (await server.ask(HEALTH)).status == 200
        wires = [await server.connect() for _ in range(3)]
        for wire in wires:
            await wire.send(POST)
        await until(lambda: engine.state().running == 3)

        def fail(*_: object) -> None:
            raise MemoryError

        engine._scheduler.schedule = fail  # type: ignore[method-assign]
        assert await seconds_until_unhealthy(server) < SECOND
        answers = [await wire.answer() for wire in wires]
        assert [answer.status for answer in answers] == [503] * 3
        assert [answer.error["code"] for answer in answers] == ["engine_stopped"] * 3
        refused = await server.ask(POST)
        assert refused.status == 503
        assert (await server.ask(request("GET", "/ready"))).status == 503
        assert "MemoryError" in (await server.ask(HEALTH)).error["message"]
        assert engine.state().free_blocks == engine.num_blocks


async def test_health_tells_of_a_stuck_step_and_of_its_end(folder: Path) -> None:
    engine = http_engine(folder)
    stuck, go_on = threading.Event(), threading.Event()

    def block(work: Callable[[], Any], _chunks: Any) -> Any:
        stuck.set()
        assert go_on.wait(20)
        return work()

    interpose(engine, block)
    async with live(engine, health_timeout=0.2) as server:
        wire = await server.connect()
        await wire.send(POST)
        await until(stuck.is_set)
        assert await seconds_until_unhealthy(server) < SECOND
        go_on.set()
        assert (await wire.answer()).status == 200
        assert (await server.ask(HEALTH)).status == 200
        await server.check_serving()


async def test_health_tells_of_steps_that_all_fail_and_of_the_first_that_does_not(folder: Path) -> None:
    engine = http_engine(folder)
    broken = True

    def fail(work: Callable[[], Any], _chunks: Any) -> Any:
        if broken:
            raise RuntimeError("the device is gone")
        return work()

    interpose(engine, fail)
    async with live(engine) as server:
        for _ in range(3):
            answer = await server.ask(POST)
            assert answer.status == 500
            assert answer.error["code"] == "step_failed"
            assert "device" not in answer.error["message"]
        assert (await server.ask(HEALTH)).status == 503
        broken = False
        await server.check_serving()
        assert (await server.ask(HEALTH)).status == 200


async def test_a_stopped_engine_refuses_and_says_so(folder: Path) -> None:
    engine = AsyncEngine(folder, EngineOptions(**SMALL))
    engine.start()
    waiting = [asyncio.ensure_future(generate(engine, prompt)) for prompt in PROMPTS]
    await engine.shutdown(0)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, (EngineStoppedError, tuple)) for result in results)
    with pytest.raises(EngineStoppedError):
        await generate(engine, PROMPTS[0])
