"""Many asynchronous iterators as one, which closes all of them when it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, nullcontext
from typing import TypeVar

T = TypeVar("T")


async def merge(
    sources: Iterable[AsyncGenerator[T, None]], at_once: int | None = None
) -> AsyncGenerator[tuple[int, T], None]:
    """Run the sources side by side and yield (number of the source, item) as items come.

    The first error of a source is raised here; all sources are closed before this generator ends.

    Args:
        sources: started in this order.
        at_once: sources that run at any time; by default all.
    """
    sources = list(sources)
    if len(sources) == 1:
        # Nothing is side by side, so there is nothing to be handed over.
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()
    turns = asyncio.Semaphore(at_once) if at_once is not None else nullcontext()

    async def pump(number: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async with turns, aclosing(source):
                async for item in source:
                    items.put_nowait((number, item))
        except Exception as error:
            items.put_nowait(error)
        else:
            items.put_nowait(None)

    pumps = [asyncio.create_task(pump(number, source)) for number, source in enumerate(sources)]
    running = len(pumps)
    try:
        while running:
            taken = await items.get()
            if isinstance(taken, Exception):
                raise taken
            if taken is None:
                running -= 1
            else:
                yield taken
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
