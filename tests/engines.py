"""Small real engines, and short ways to use them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_engine.request import GenerationOutput, GenerationRequest, SamplingParams, ScoreRequest, Window

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
SMALL: dict[str, Any] = {"kv_cache_memory": 1 << 20, "block_size": 4, "max_num_batched_tokens": 64}


class HttpEngine(AsyncEngine):
    """A real engine with what the helpers of a live server look at."""

    @property
    def active(self) -> dict[Any, Any]:
        return self._jobs

    @property
    def free_blocks(self) -> int:
        return self.state().free_blocks


@asynccontextmanager
async def engine_of(folder: Path, observer: Any = None, **options: Any) -> AsyncIterator[AsyncEngine]:
    """A started engine that must end alive, with all blocks free and nothing at work."""
    engine = AsyncEngine(folder, EngineOptions(**{**SMALL, **options}), observer)
    engine.start()
    try:
        yield engine
    finally:
        state = engine.state()
        await engine.shutdown(0)
    assert state.failure is None
    assert (state.free_blocks, state.running, state.waiting) == (state.total_blocks, 0, 0)
    engine._scheduler.check_invariants()


def tokens(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(1, 300), k=length))


async def generate(
    engine: AsyncEngine, prompt: tuple[int, ...], sampling: SamplingParams = GREEDY, **more: Any
):
    request = GenerationRequest("r", prompt, sampling, **more)
    return [output async for output in engine.generate(request)]


def drawn(outputs: list[GenerationOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def score(engine: AsyncEngine, ids: tuple[int, ...], *windows: Window) -> list[tuple[float, ...]]:
    return [scores.logprobs async for scores in engine.score(ScoreRequest("s", ids, windows))]
