"""Many small items as few lists, for a road where every message costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def gathered(
    source: AsyncGenerator[T, None], pause: Callable[[], float]
) -> AsyncGenerator[list[T], None]:
    """Yield the first item at once, and then what has come, `pause()` seconds later at the earliest.

    Raises what the source raises, after its last items. Closing closes the source.
    """
    held: list[T] = []
    arrived = asyncio.Event()

    async def pump() -> None:
        async with aclosing(source):
            async for item in source:
                held.append(item)
                arrived.set()

    task = asyncio.create_task(pump())
    task.add_done_callback(lambda _: arrived.set())
    try:
        while not task.done() or held:
            await arrived.wait()
            if not task.done():
                arrived.clear()
            if held:
                ready = held.copy()
                held.clear()
                yield ready
                await asyncio.wait({task}, timeout=pause())
        task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
