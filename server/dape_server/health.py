"""Whether the server is alive and whether it takes work, and a port of its own that says so.

The verdict is read from snapshots and waits for nothing. It is told on the main port, by the event loop
that serves everyone, and, with `health_port`, by a thread whose only task it is.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from dape_engine.errors import SettingsError
from dape_engine.request import EngineState
from dape_server.context import Context
from dape_server.errors import UnavailableError, error_response
from dape_server.lifecycle import Phase
from dape_server.settings import ServerSettings

MAX_PROBES = 64
"""Connections to the port of health."""


def health_answer(context: Context) -> JSONResponse:
    """Return 200 while the engine lives: its thread runs, and steps end when there is work."""
    if (trouble := _trouble(context)) is not None:
        return error_response(UnavailableError(trouble, code="unhealthy"))
    return JSONResponse({"status": "ok"})


def ready_answer(context: Context) -> JSONResponse:
    """Return 200 while work is taken; 503 while the server starts or drains, or is not healthy."""
    phase = context.lifecycle.phase
    if phase is not Phase.READY:
        return error_response(UnavailableError(f"the server is {phase}", code=phase))
    return health_answer(context)


def _trouble(context: Context) -> str | None:
    state = context.engine.state()
    if state.stopped and state.failure is None and context.lifecycle.phase is Phase.READY:
        return "the engine has stopped"
    return engine_trouble(state, context.settings.health_timeout)


def engine_trouble(state: EngineState, limit: float) -> str | None:
    """Return what is wrong with an engine that should be at work, if anything.

    Args:
        state: a snapshot of it.
        limit: seconds that it may take for one step.
    """
    if state.failure is not None:
        return state.failure
    if state.seconds_since_progress > limit:
        return f"no step has ended for {state.seconds_since_progress:.0f} s, the limit is {limit:.0f} s"
    return None


class LoopWatch:
    """Notices an event loop that no longer turns.

    Args:
        loop: the one that is watched, from another thread.
        limit: seconds that it may take to answer.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: float):
        self._loop = loop
        self._limit = limit
        self._asked: float | None = None

    def trouble(self) -> str | None:
        """Return what is wrong, and ask the loop for its next sign of life."""
        now = time.monotonic()
        asked = self._asked
        if asked is None:
            self._asked = now
            self._loop.call_soon_threadsafe(self._turned)
        elif now - asked > self._limit:
            return f"the event loop has not turned for {now - asked:.0f} s, the limit is {self._limit:.0f} s"
        return None

    def _turned(self) -> None:
        self._asked = None


def listen(settings: ServerSettings) -> socket.socket | None:
    """Return a socket on `health_port`, or None where none is set.

    Raises:
        SettingsError: the port cannot be listened on.
    """
    if settings.health_port is None:
        return None
    return open_listener(settings.host, settings.health_port, "--health-port")


def open_listener(host: str, port: int, option: str) -> socket.socket:
    """Return a socket that listens.

    Raises:
        SettingsError: the address is another's or nobody's; the message names the option of the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise SettingsError(f"{option} {port}: cannot listen on {host}: {reason}") from error
    # Its connections inherit this. asyncio leaves it off for sockets it has not made, and then the second
    # part of an answer waits 40 ms for the client to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextmanager
def answering(listener: socket.socket, context: Context) -> Iterator[None]:
    """Answer /health and /ready on a socket, from a thread of its own; there is no key and no other route.

    Has to be entered in the event loop that serves everyone.
    """
    watch = LoopWatch(asyncio.get_running_loop(), context.settings.health_timeout)
    config = uvicorn.Config(
        _probes(context, watch),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_PROBES,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="dape-health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _probes(context: Context, watch: LoopWatch) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        if (trouble := watch.trouble()) is not None:
            return error_response(UnavailableError(trouble, code="unhealthy"))
        return health_answer(context)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        if (trouble := watch.trouble()) is not None:
            return error_response(UnavailableError(trouble, code="unhealthy"))
        return ready_answer(context)

    return app
