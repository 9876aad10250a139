"""What an engine is timed at. Each function runs in the engine's process (see `EngineProcess`)."""

from __future__ import annotations

import asyncio
import time

import torch

from dape_engine.engine import AsyncEngine
from dape_engine.errors import SettingsError
from dape_engine.request import GenerationRequest, SamplingParams
from dape_kernels.bench.machine import peak_memory

SHARED_PROMPT = 1000


async def backend_name(engine: AsyncEngine) -> str:
    """Return the attention backend that the engine has chosen."""
    return engine.backend_name


async def prefill(engine: AsyncEngine, length: int, seed: int) -> float:
    """Return tokens per second until the first token of a random prompt that no cached prefix matches."""
    started = time.perf_counter()
    async for _ in engine.generate(_request(engine, length, seed, 1)):
        pass
    return length / (time.perf_counter() - started)


async def decode(engine: AsyncEngine, context: int, streams: int, tokens: int) -> float:
    """Return tokens per second over all streams, while all of them decode.

    The streams share their prompt's blocks, so that it is prefilled once; every stream still attends to all
    of it in every step.

    Args:
        engine: the engine.
        context: tokens of the prompt.
        streams: sequences that decode at once.
        tokens: that each of them generates.

    Raises:
        SettingsError: they never decode all at once.
    """
    async for _ in engine.generate(_request(engine, context, SHARED_PROMPT, 1)):
        pass
    # (when, how many tokens), per stream.
    stamps: list[list[tuple[float, int]]] = [[] for _ in range(streams)]

    async def stream(index: int) -> None:
        async for output in engine.generate(_request(engine, context, SHARED_PROMPT, tokens, index)):
            stamps[index].append((time.perf_counter(), len(output.token_ids)))

    await asyncio.gather(*(stream(index) for index in range(streams)))
    begin = max(times[0][0] for times in stamps)
    end = min(times[-1][0] for times in stamps)
    if end <= begin:
        raise SettingsError(
            f"{streams} streams of {tokens} tokens never decoded all at once; "
            f"max_num_seqs is {engine.options.max_num_seqs}"
        )
    return sum(count for times in stamps for when, count in times if begin < when <= end) / (end - begin)


async def memory(engine: AsyncEngine, tokens: int) -> tuple[int, int]:
    """Return the process's peak memory in bytes, and how much of it the cache of `tokens` tokens is."""
    block = engine.options.kv_cache_memory / engine.num_blocks
    return peak_memory(), round(-(-tokens // engine.block_size) * block)


def _request(engine: AsyncEngine, length: int, seed: int, tokens: int, index: int = 0) -> GenerationRequest:
    """Return a random prompt that generates exactly `tokens` tokens."""
    generator = torch.Generator().manual_seed(seed * 100_003 + length)
    prompt = torch.randint(1, engine.tokenizer.vocab_size, (length,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return GenerationRequest(f"bench-{seed}-{index}", tuple(prompt), sampling)
