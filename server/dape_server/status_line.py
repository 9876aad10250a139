"""A line in the log about the engine's work, now and then while there is any."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from dape_engine.request import EngineState
from dape_server.metrics import Totals

logger = logging.getLogger(__name__)


class StatusLine:
    """What the engine has done since the last line.

    Args:
        totals: tokens since the start, kept up to date by the engine's observer.
        state: the engine's snapshot.
        now: seconds of the monotonic clock.
    """

    def __init__(self, totals: Totals, state: Callable[[], EngineState], now: float):
        self._totals = totals
        self._state = state
        self._then = now
        self._before = replace(totals)

    def log(self, now: float) -> None:
        """Log a line, unless nothing was done since the last one and nothing waits."""
        state, totals, before = self._state(), replace(self._totals), self._before
        seconds = now - self._then
        self._then, self._before = now, totals
        if totals.steps == before.steps and state.running == state.waiting == 0:
            return
        queries = totals.prefix_queries - before.prefix_queries
        figures = {
            "prompt_tokens_per_second": (totals.prompt - before.prompt) / seconds,
            "generation_tokens_per_second": (totals.generated - before.generated) / seconds,
            "scored_tokens_per_second": (totals.scored - before.scored) / seconds,
            "cache_usage": 1 - state.free_blocks / state.total_blocks,
            "prefix_hit_rate": (totals.prefix_hits - before.prefix_hits) / queries if queries else 0.0,
        }
        rounded: dict[str, object] = {name: round(value, 3) for name, value in figures.items()}
        logger.info(
            "prompt %.1f tokens/s, generation %.1f tokens/s, scored %.1f tokens/s, running %d, "
            "waiting %d, cache %.1f%%, prefix hits %.1f%%",
            figures["prompt_tokens_per_second"],
            figures["generation_tokens_per_second"],
            figures["scored_tokens_per_second"],
            state.running,
            state.waiting,
            100 * figures["cache_usage"],
            100 * figures["prefix_hit_rate"],
            extra={"fields": {**rounded, "running": state.running, "waiting": state.waiting}},
        )


async def log_status(totals: Totals, state: Callable[[], EngineState], interval: float) -> None:
    """Log a line every `interval` seconds until cancelled."""
    line = StatusLine(totals, state, time.monotonic())
    while True:
        await asyncio.sleep(interval)
        line.log(time.monotonic())
