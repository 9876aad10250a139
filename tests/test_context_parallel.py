"""Ranks that hold the keys together give what one process gives, and one that is gone is named."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from dape_engine.context_parallel.ranks import spread_blocks
from dape_engine.engine import AsyncEngine
from dape_engine.errors import RequestError, SettingsError, StepError
from dape_engine.inspection import InspectionRequest
from dape_engine.options import EngineOptions
from dape_engine.request import Window
from dape_kernels.paged import KeyShard
from engines import GREEDY, SMALL, drawn, engine_of, generate, score, tokens
from models import write_model

WINDOWS = (Window(0, 290, 1), Window(100, 400, 250))
RANKS = {"context_parallel_size": 2, "threads": 1, "kv_cache_memory": 4 << 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", max_model_len=1024)


def test_the_scheduler_block_is_one_stripe_of_every_rank() -> None:
    tables = torch.tensor([[3, 0], [1, 0]], dtype=torch.int32)
    shard = KeyShard(rank=1, ranks=2, stripe=2)
    assert spread_blocks(tables, shard).tolist() == [[6, 7, 6, 7, 0, 1, 0, 1], [2, 3, 2, 3, 0, 1, 0, 1]]


async def test_two_ranks_give_what_one_process_gives(folder: Path) -> None:
    """Streams beside a scoring that goes through the layers in pieces, and again from the prefix cache."""
    prompts, text = [tokens(1, 5), tokens(2, 300), tokens(3, 128)], tokens(4, 420)
    async with engine_of(folder, kv_cache_memory=4 << 20) as engine:
        expected = [drawn(await generate(engine, prompt)) for prompt in prompts]
        scores = await score(engine, text, *WINDOWS)
    async with engine_of(folder, **RANKS) as engine:
        assert engine.block_size == 2 * 64
        for _ in range(2):
            *streams, found = await asyncio.gather(
                *(generate(engine, prompt) for prompt in prompts), score(engine, text, *WINDOWS)
            )
            assert [drawn(outputs) for outputs in streams] == expected
            for own, other in zip(found, scores, strict=True):
                torch.testing.assert_close(torch.tensor(own), torch.tensor(other), rtol=1e-4, atol=1e-4)
        assert streams[1][0].num_cached_tokens == 2 * engine.block_size
        with pytest.raises(RequestError, match="context_parallel_size is 2"):
            await engine.inspect(InspectionRequest("i", text, query=5, layers=(0,), heads=(0,)))


async def test_a_rank_that_dies_is_named_and_nobody_waits(folder: Path) -> None:
    engine = AsyncEngine(folder, EngineOptions(**{**SMALL, **RANKS}))
    engine.start()
    try:
        assert len(drawn(await generate(engine, tokens(1, 5)))) == GREEDY.max_tokens
        engine._runner._ranks._processes[0].kill()
        for _ in range(3):
            with pytest.raises(StepError, match="dape-rank-1 of 2 ranks has failed"):
                await generate(engine, tokens(1, 200))
        assert engine.state().failure is not None
        assert engine.state().free_blocks == engine.state().total_blocks
    finally:
        await engine.shutdown(0)


def test_what_ranks_cannot_compute_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "cope", position={"kind": "cope"})
    with pytest.raises(SettingsError, match=r"context_parallel_size: .*CoPE"):
        AsyncEngine(folder, EngineOptions(**{**SMALL, **RANKS, "attention_backend": "chunked"}))
