"""Background work goes through the model in pieces between the steps of the others, with the same results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dape_engine.engine import AsyncEngine
from dape_engine.errors import StepError
from dape_engine.request import GenerationRequest, SamplingParams, Scheduling, ScoreRequest, Window
from dape_engine.sequence import Sequence
from engines import drawn, engine_of, generate, score, tokens
from models import write_model

KINDS = {
    "fused": {},
    "layer by layer": {"position": {"kind": "rope", "fraction": 0.5}, "dape": {"width": 8}},
}
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
WINDOWS = (Window(0, 150, 1), Window(20, 170, 100), Window(0, 90, 5))


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", **KINDS[request.param])


@asynccontextmanager
async def talking(engine: AsyncEngine) -> AsyncIterator[list[list[int]]]:
    """Someone who generates one text after another; yields the texts, which grow."""
    begun = asyncio.Event()
    texts: list[list[int]] = []

    async def talk() -> None:
        while True:
            texts.append([])
            async for output in engine.generate(GenerationRequest("talk", tokens(0, 5), LONG)):
                texts[-1] += output.token_ids
                begun.set()

    task = asyncio.ensure_future(talk())
    await begun.wait()
    yield texts
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def count_takeoffs(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    begin = engine._runner.begin

    def noting(chunks: Any) -> Any:
        if any(chunk.sequence.priority > 0 for chunk in chunks):
            sizes.append(len(chunks))
        return begin(chunks)

    monkeypatch.setattr(engine._runner, "begin", noting)
    return sizes


async def test_scores_beside_a_generation_equal_those_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [tokens(seed, 170) for seed in range(1, 4)]
    async with engine_of(folder, block_size=16) as engine:
        alone = [await score(engine, text, *WINDOWS) for text in texts]
        said = drawn(await generate(engine, tokens(0, 5), LONG))
    async with engine_of(folder, block_size=16) as engine:
        sizes = count_takeoffs(engine, monkeypatch)
        async with talking(engine) as talk:
            beside = await asyncio.gather(*(score(engine, text, *WINDOWS) for text in texts))
            assert len(sizes) >= 3
    assert all(text == said for text in talk[:-1])
    assert talk[-1] == said[: len(talk[-1])]
    for one, other in zip(alone, beside, strict=True):
        for window, same in zip(one, other, strict=True):
            assert window == pytest.approx(same, abs=1e-4)


async def test_a_flight_ends_at_once_when_nobody_decodes_any_more(folder: Path) -> None:
    async with engine_of(folder, block_size=16) as engine:
        async with talking(engine):
            scoring = asyncio.ensure_future(score(engine, tokens(1, 170), *WINDOWS))
            await asyncio.sleep(0)
        assert len(await scoring) == 3


async def test_those_who_leave_in_flight_leave_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[Any] = []
    async with engine_of(folder, block_size=16) as engine:
        expected = await score(engine, tokens(2, 170), *WINDOWS)
    async with engine_of(folder, block_size=16) as engine, talking(engine):
        taken_off = asyncio.Event()
        loop = asyncio.get_running_loop()
        begin = engine._runner.begin

        def noting(chunks: Any) -> Any:
            loop.call_soon_threadsafe(taken_off.set)
            return begin(chunks)

        monkeypatch.setattr(engine._runner, "begin", noting)
        stays = asyncio.ensure_future(score(engine, tokens(2, 170), *WINDOWS))
        for seed in range(10, 20):
            taken_off.clear()
            leaves = asyncio.ensure_future(score(engine, tokens(seed, 170), *WINDOWS))
            await taken_off.wait()
            leaves.cancel()
            await asyncio.gather(leaves, return_exceptions=True)
        for window, same in zip(await stays, expected, strict=True):
            assert window == pytest.approx(same, abs=1e-4)


async def test_background_generations_fly_only_while_they_read(folder: Path) -> None:
    short = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    async with engine_of(folder, block_size=16) as engine:
        alone = drawn(await generate(engine, tokens(3, 120), short))
    async with engine_of(folder, block_size=16) as engine, talking(engine):
        outputs = await generate(engine, tokens(3, 120), short, scheduling=Scheduling(priority=5))
    assert drawn(outputs) == alone


def fail_for(sequence_is: Callable[[Sequence], bool], run: Any) -> Any:
    def fail(work: Any, *rest: Any) -> Any:
        chunks = getattr(work, "chunks", work)
        if any(sequence_is(chunk.sequence) for chunk in chunks):
            raise MemoryError
        return run(work, *rest)

    return fail


@pytest.mark.parametrize("stage", ["begin", "advance", "finish"])
async def test_a_fault_in_flight_ends_its_own_request_only(
    folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tokens(9, 60)
    async with engine_of(folder, block_size=16) as engine, talking(engine):
        fail = fail_for(lambda s: s.tokens[:5] == list(bad[:5]), getattr(engine._runner, stage))
        monkeypatch.setattr(engine._runner, stage, fail)
        good, broken = await asyncio.gather(
            score(engine, tokens(4, 60), Window(0, 60, 1)),
            score(engine, bad, Window(0, 60, 1)),
            return_exceptions=True,
        )
        assert isinstance(broken, StepError)
        assert not isinstance(good, BaseException)
        assert engine.state().failure is None


async def test_closing_an_iterator_in_flight_frees_its_blocks(folder: Path) -> None:
    async with engine_of(folder, block_size=16) as engine, talking(engine):
        stream = engine.score(ScoreRequest("s", tokens(1, 170), WINDOWS))
        async with aclosing(stream):
            await anext(stream)
