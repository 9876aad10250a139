"""Many engines with the face of one: every request goes to a replica, and to another one if that is lost.

The application above it is the same as for one engine in its own process. It checks, counts and formats; a
replica computes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from dape_engine.errors import DeadlineError, EngineStoppedError, QueueFullError
from dape_engine.inspection import Inspection, InspectionRequest
from dape_engine.options import EngineOptions
from dape_engine.request import (
    EngineState,
    GenerationOutput,
    GenerationRequest,
    ScoreRequest,
    WindowScores,
)
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config
from dape_server.errors import UnavailableError
from dape_server.replicas.metrics import FrontMetrics
from dape_server.replicas.order import Order, Refusal, pack
from dape_server.replicas.replica import Description
from dape_server.replicas.reports import Reports
from dape_server.replicas.resume import GenerationResume, InspectionResume, Resume, ScoreResume

logger = logging.getLogger(__name__)
ATTEMPTS = 5
"""Replicas that one request may lose before it is given up."""
GRACE = 10.0
"""Seconds after a request's deadline in which its replica must have ended it."""
PAUSE = 0.2
"""Seconds before the second attempt after the first, twice as many before the third, and so on."""
LOST = (RayActorError, TaskCancelledError, ReplicaUnavailableError, RequestCancelledError)
"""What is raised where a replica has ended, or is ending, in the middle of a request."""


class LostError(Exception):
    """The replica at work on a request is gone, or cannot finish it.

    Args:
        replica: its name, where it is known.
    """

    def __init__(self, replica: str | None = None):
        super().__init__(replica)
        self.replica = replica


class ReplicatedEngine:
    """`dape_server.context.Engine` over the replicas of a deployment.

    Args:
        folder: of the model; its configuration and tokenizer are read here too.
        options: of the engines.
        handle: of the deployment of `EngineReplica`.
        description: of its engines.
        reports: of its replicas.
        metrics: count the requests that change replicas.
    """

    def __init__(
        self,
        folder: Path,
        options: EngineOptions,
        handle: Any,
        description: Description,
        reports: Reports,
        metrics: FrontMetrics,
    ):
        self.model_name = folder.resolve().name
        self.config = load_config(folder, options.yarn_factor)
        self.tokenizer = TextTokenizer.load(folder, self.config)
        self.block_size = options.block_size
        self.max_model_len = description.max_model_len
        self.dtype_name = description.dtype
        self.backend_name = description.backend
        self._work = handle.options(method_name="work", stream=True)
        self._reports = reports
        self._metrics = metrics
        self._running: set[Any] = set()
        self._stopped = False

    def start(self) -> None:
        """Begin to listen to the replicas, which run already; needs a running event loop."""
        self._reports.start()

    async def shutdown(self, drain_seconds: float) -> None:
        """Refuse new requests, abort those that still run after so many seconds; the replicas go on."""
        self._stopped = True
        deadline = time.monotonic() + drain_seconds
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for response in self._running:
            response.cancel()
        self._reports.stop()

    def state(self) -> EngineState:
        """Return the sums of the replicas' last reports."""
        return replace(self._reports.state(), stopped=self._stopped)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """Yield the outputs of one completion, as `AsyncEngine.generate` does."""
        async with aclosing(self._answer(GenerationResume(request))) as items:
            async for item in items:
                yield cast("GenerationOutput", item)

    async def score(self, request: ScoreRequest) -> AsyncGenerator[WindowScores, None]:
        """Yield the scores of each window, as `AsyncEngine.score` does."""
        async with aclosing(self._answer(ScoreResume(request))) as items:
            async for item in items:
                yield cast("WindowScores", item)

    async def inspect(self, request: InspectionRequest) -> Inspection:
        """Return what one query of a text sees of its keys, as `AsyncEngine.inspect` does."""
        async with aclosing(self._answer(InspectionResume(request))) as items:
            return cast("Inspection", await anext(items))

    async def _answer(self, resume: Resume) -> AsyncGenerator[object, None]:
        """Yield the items of one answer, from as many replicas as it takes.

        Raises:
            UnavailableError: it has lost too many of them.
            DapeError: what the engine of a replica has raised.
        """
        avoid: frozenset[str] = frozenset()
        for attempt in range(ATTEMPTS):
            order = replace(pack(resume.request()), avoid=avoid)
            try:
                async with aclosing(self._attempt(order)) as items:
                    async for item in items:
                        if (news := resume.news(item)) is not None:
                            yield news
                return
            except LostError as lost:
                if resume.finished:
                    return
                logger.warning("a replica was lost in the middle of a request, which goes to another one")
                self._metrics.moved.inc()
                if lost.replica is not None:
                    avoid |= {lost.replica}
                await asyncio.sleep(attempt * PAUSE)
        raise UnavailableError(f"the request has lost {ATTEMPTS} replicas", code="replicas_lost")

    async def _attempt(self, order: Order) -> AsyncGenerator[object, None]:
        """Yield what one replica answers; closing aborts its work.

        Raises:
            LostError: the replica has ended, or its engine has.
            DeadlineError: nothing came long after the request's time limit.
            QueueFullError: too many requests wait for any replica.
            UnavailableError: there is no replica, and none can be started.
            DapeError: what the engine has raised.
        """
        if self._stopped:
            raise EngineStoppedError("the server is shutting down")
        limit = None if order.expires is None else order.expires - time.time() + GRACE
        when = None if limit is None else asyncio.get_running_loop().time() + limit
        response = self._work.remote(order)
        self._running.add(response)
        try:
            while True:
                async with asyncio.timeout_at(when):
                    items = await anext(response, None)
                if items is None:
                    return
                if isinstance(items, Refusal):
                    if isinstance(items.error, EngineStoppedError):
                        raise LostError(items.replica)
                    raise items.error
                for item in items:
                    yield item
        except TimeoutError as error:
            raise DeadlineError("no replica has answered within the request's time limit") from error
        except LOST as error:
            if self._stopped:
                raise EngineStoppedError("the server has stopped before the request was finished") from error
            raise LostError from error
        except BackPressureError as error:
            raise QueueFullError("too many requests wait for a replica") from error
        except DeploymentUnavailableError as error:
            raise UnavailableError(
                "no replica can be started; the log says why", code="no_replica"
            ) from error
        finally:
            self._running.discard(response)
            response.cancel()
