"""The application: routes, error handlers and what surrounds them, over one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from anyio import to_thread
from fastapi import FastAPI

from dape_engine.errors import SettingsError
from dape_engine.grammar import GrammarCompiler
from dape_server.chat import ChatTemplate
from dape_server.context import Context, Engine, fingerprint
from dape_server.errors import install_handlers
from dape_server.health import answering, listen
from dape_server.keys import accepted_keys
from dape_server.lifecycle import Lifecycle
from dape_server.metrics import Metrics
from dape_server.middleware import OPEN_PATHS, AdmitWork, BoundHeaders, OwnBody, RequireKey
from dape_server.observe import ObserveRequests
from dape_server.openapi import describe
from dape_server.routes import (
    attention_bias,
    chat,
    completions,
    models,
    perplexity,
    playground,
    status,
    tokenize,
)
from dape_server.settings import ServerSettings
from dape_server.status_line import log_status
from dape_server.text import TextService
from dape_server.version import package_version

if TYPE_CHECKING:
    from dape_server.tracing import Tracing

ROUTERS = tuple(
    module.router
    for module in (completions, chat, perplexity, attention_bias, models, tokenize, status, playground)
)


def create_app(engine: Engine, settings: ServerSettings, metrics: Metrics | None = None) -> FastAPI:
    """Return the application that serves one engine.

    Args:
        engine: loaded, not started: the application starts it and stops it.
        settings: of the server.
        metrics: the engine's observer, to be exposed at /metrics; without it the figures of steps and
            requests stay empty.

    Raises:
        SettingsError: the file of keys or the port of health cannot be used, or a package for traces
            is missing.
    """
    name = settings.served_model_name or engine.model_name
    keys = accepted_keys(settings)
    context = Context(
        engine,
        settings,
        metrics or Metrics(name),
        Lifecycle(),
        TextService(engine.tokenizer, engine.config.vocab_size),
        GrammarCompiler(engine.tokenizer, engine.config.vocab_size),
        ChatTemplate.of(engine.tokenizer),
        started=int(time.time()),
        fingerprint=fingerprint(engine, package_version()),
    )
    context.metrics.watch(engine.state, engine.block_size)
    tracing = _tracing(settings.otlp_endpoint, name)
    if tracing is not None:
        context.metrics.tell(tracing.on_finished)
    listener = listen(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(to_thread.run_sync, tracing.shutdown)
            if listener is not None:
                stack.enter_context(answering(listener, context))
            if settings.log_stats_interval > 0:
                lines = log_status(context.metrics.totals, engine.state, settings.log_stats_interval)
                stack.callback(asyncio.ensure_future(lines).cancel)
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
    )
    app.state.context = context
    for router in ROUTERS:
        app.include_router(router)
    install_handlers(app)
    # As FastAPI's documentation has it; statically, a method is not to be assigned to.
    app.openapi = describe(app, ROUTERS, bool(keys), OPEN_PATHS)  # type: ignore[method-assign]
    # The one added last is the outermost.
    app.add_middleware(
        OwnBody,
        limit=settings.max_body_size,
        total=settings.max_total_body_size,
        timeout=settings.receive_timeout,
    )
    app.add_middleware(AdmitWork, lifecycle=context.lifecycle)
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    app.add_middleware(BoundHeaders)
    app.add_middleware(
        ObserveRequests, metrics=context.metrics, tracing=tracing, log_access=settings.access_log
    )
    return app


def _tracing(endpoint: str | None, model_name: str) -> Tracing | None:
    """Return where traces go; what they need is imported only where they are asked for."""
    if endpoint is None:
        return None
    try:
        tracing = import_module("dape_server.tracing")
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"--otlp-endpoint needs the package {error.name}; pip install 'dape-serve[otel]' installs it"
        ) from error
    made: Tracing = tracing.Tracing(model_name, tracing.to_collector(endpoint))
    return made
