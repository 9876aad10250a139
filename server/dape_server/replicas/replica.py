"""One engine in a process of its own, as a Ray Serve replica."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from anyio import to_thread
from prometheus_client import Metric
from ray import serve

from dape_engine.engine import AsyncEngine
from dape_engine.errors import DapeError, EngineStoppedError
from dape_engine.grammar import GrammarCompiler
from dape_engine.inspection import InspectionRequest
from dape_engine.options import EngineOptions
from dape_engine.request import EngineState, GenerationRequest
from dape_server.health import engine_trouble
from dape_server.logs import configure
from dape_server.metrics import Metrics
from dape_server.replicas.gather import gathered
from dape_server.replicas.order import Order, Refusal, unpack
from dape_server.settings import ServerSettings
from dape_server.status_line import log_status

PAUSE, MESSAGE_SECONDS = 0.02, 0.003
"""Seconds between two messages of one answer, and on average of a replica, at least: a message costs a good
part of a millisecond on both sides. So each of 16 answers at work sends what it has gained every 48 ms."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the server has to know of its engines."""

    dtype: str
    backend: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Report:
    """The state and the figures of one replica."""

    engine: str
    """The replica's number among the others, its label in the metrics."""
    pid: int
    state: EngineState
    families: list[Metric]


class EngineReplica:
    """Loads the model and does what it is ordered to.

    Args:
        folder: of the model, on the replica's machine.
        options: of the engine.
        settings: of the server.
    """

    def __init__(self, folder: Path, options: EngineOptions, settings: ServerSettings):
        configure(settings.log_format, settings.log_level)
        place = serve.get_replica_context()
        self._name = place.replica_id.unique_id
        self._rank = str(place.rank.rank)
        self._health_timeout = settings.health_timeout
        self._metrics = Metrics(settings.served_model_name or folder.resolve().name, self._rank)
        self._engine = AsyncEngine(folder, options, self._metrics)
        self._metrics.watch(self._engine.state, self._engine.block_size)
        self._grammars = GrammarCompiler(self._engine.tokenizer, self._engine.config.vocab_size)
        self._at_work = 0
        if settings.log_stats_interval > 0:
            lines = log_status(self._metrics.totals, self._engine.state, settings.log_stats_interval)
            self._status = asyncio.ensure_future(lines)
        # As in a server of its own: the collector is not to look at the libraries' objects again and again.
        gc.collect()
        gc.freeze()
        self._engine.start()

    async def describe(self) -> Description:
        """Return what the server has to know."""
        engine = self._engine
        return Description(engine.dtype_name, engine.backend_name, engine.max_model_len)

    async def work(self, order: Order) -> AsyncGenerator[list[object] | Refusal, None]:
        """Yield what the engine yields, in lists; the last item is a refusal where it has raised an error."""
        self._at_work += 1
        try:
            async with aclosing(gathered(self._items(order), self._pause)) as lists:
                async for items in lists:
                    yield items
        except DapeError as error:
            yield Refusal(error, self._name)
        finally:
            self._at_work -= 1

    def _pause(self) -> float:
        """Return the seconds between two messages of one answer."""
        return max(PAUSE, self._at_work * MESSAGE_SECONDS)

    async def _items(self, order: Order) -> AsyncGenerator[object, None]:
        if order.grammar is None:
            request = unpack(order, self._grammars)
        else:
            request = await to_thread.run_sync(unpack, order, self._grammars)
        if isinstance(request, InspectionRequest):
            yield await self._engine.inspect(request)
            return
        engine = self._engine
        items: AsyncGenerator[object, None]
        items = engine.generate(request) if isinstance(request, GenerationRequest) else engine.score(request)
        async with aclosing(items):
            async for item in items:
                yield item

    async def report(self) -> Report:
        """Return the state and the figures."""
        return Report(self._rank, os.getpid(), self._engine.state(), list(self._metrics.registry.collect()))

    async def check_health(self) -> None:
        """Tell Ray Serve whether the engine lives, by the rule of /health: being busy is not being ill.

        Raises:
            EngineStoppedError: it does not, and has to be started anew.
        """
        if (trouble := engine_trouble(self._engine.state(), self._health_timeout)) is not None:
            raise EngineStoppedError(trouble)
