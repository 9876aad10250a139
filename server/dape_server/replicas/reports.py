"""What the replicas say of themselves, asked once a second, so that /health and /metrics wait for nobody."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import Metric
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from dape_engine.request import EngineState
from dape_server.replicas.replica import Report

logger = logging.getLogger(__name__)
INTERVAL = 1.0
"""Seconds between two reports."""
PATIENCE = 5.0
"""Seconds that one may take; where it takes longer, the last reports go on to be told."""


class Reports:
    """The last reports of all replicas.

    Args:
        handle: of the deployment.
    """

    def __init__(self, handle: Any):
        self._handle = handle
        self._last: dict[str, Report] = {}
        self._heard = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to ask; needs a running event loop."""
        self._heard = time.monotonic()
        self._task = asyncio.ensure_future(self._listen())

    def stop(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()

    def families(self) -> Iterable[tuple[str, Iterable[Metric]]]:
        """Return the label and the metrics of every replica."""
        return [(report.engine, report.families) for report in self._last.values()]

    def state(self) -> EngineState:
        """Return the sums of all replicas. There is no progress while none of them answers."""
        states = [report.state for report in self._last.values()]
        silence = time.monotonic() - self._heard
        return EngineState(
            running=sum(state.running for state in states),
            waiting=sum(state.waiting for state in states),
            waiting_tokens=sum(state.waiting_tokens for state in states),
            free_blocks=sum(state.free_blocks for state in states),
            total_blocks=sum(state.total_blocks for state in states),
            cached_blocks=sum(state.cached_blocks for state in states),
            steps=sum(state.steps for state in states),
            seconds_since_progress=silence if silence > INTERVAL + PATIENCE else 0.0,
            stopped=False,
        )

    async def _listen(self) -> None:
        while True:
            await self._ask()
            await asyncio.sleep(INTERVAL)

    async def _ask(self) -> None:
        try:
            answers = await self._handle.broadcast("report").results_async(
                timeout_s=PATIENCE, return_exceptions=True
            )
        except TimeoutError:
            return
        except (RayError, RayServeException):
            logger.warning("no replica answers")
            self._last = {}
            return
        found = [answer for answer in answers if isinstance(answer, Report)]
        if found:
            self._heard = time.monotonic()
        self._last = {report.engine: report for report in found}
