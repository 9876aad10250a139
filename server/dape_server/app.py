"""The application: routes, error handlers and what surrounds them, over one engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from dape_server.context import Context, Engine
from dape_server.errors import ErrorResponse, install_handlers
from dape_server.lifecycle import Lifecycle
from dape_server.metrics import Metrics
from dape_server.middleware import AdmitWork, ObserveRequests, OwnBody, RequireKey
from dape_server.routes import completions, models, perplexity, status, tokenize
from dape_server.settings import ServerSettings
from dape_server.text import TextService

REFUSALS = (400, 401, 404, 413, 415, 429, 500, 503)


def create_app(engine: Engine, settings: ServerSettings, metrics: Metrics | None = None) -> FastAPI:
    """Return the application that serves one engine.

    Args:
        engine: loaded, not started: the application starts it and stops it.
        settings: of the server.
        metrics: the engine's observer, to be exposed at /metrics; without it the figures of steps and
            requests stay empty.
    """
    name = settings.served_model_name or engine.model_name
    context = Context(
        engine,
        settings,
        metrics or Metrics(name),
        Lifecycle(),
        TextService(engine.tokenizer, engine.config.vocab_size),
        started=int(time.time()),
    )
    context.metrics.watch(engine.state)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        context.lifecycle.open()
        yield
        context.lifecycle.drain()
        await engine.shutdown(0)

    app = FastAPI(
        title="dape-serve",
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        responses={code: {"model": ErrorResponse} for code in REFUSALS},
    )
    app.state.context = context
    for module in (completions, perplexity, models, tokenize, status):
        app.include_router(module.router)
    install_handlers(app)
    # The one added last is the outermost.
    app.add_middleware(OwnBody, limit=settings.max_body_size)
    app.add_middleware(AdmitWork, lifecycle=context.lifecycle)
    if settings.api_key:
        app.add_middleware(RequireKey, keys=[key.get_secret_value() for key in settings.api_key])
    app.add_middleware(ObserveRequests, metrics=context.metrics)
    return app
