"""Serving until a signal: the first one drains, the second aborts what still runs."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import socket
from contextvars import Context as Variables
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dape_server.connection import BoundedConnection
from dape_server.context import Context
from dape_server.limits import MAX_HEADER_BYTES

logger = logging.getLogger(__name__)
FLUSH_SECONDS = 5
"""Given to slow readers for the rest of their answers once no request is at work."""
OTHER_FILES = 256
"""Files that a server has open beside its connections, at most."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes its work before it closes its socket.

    While it drains it still answers: /health with 200, /ready and new work with 503.
    """

    def __init__(self, config: uvicorn.Config, context: Context):
        super().__init__(config)
        self._context = context
        self._signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped by signals."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """Begin to stop. Unlike uvicorn's, this does not raise the signal again: the exit code is 0."""
        self._signals += 1
        timeout = self._context.settings.shutdown_timeout if self._signals == 1 else 0.0
        # The signal may have come in the middle of a request, whose name is not to stand in the log here.
        Variables().run(asyncio.run_coroutine_threadsafe, self._stop(timeout), self._loop)

    async def _stop(self, timeout: float) -> None:
        context = self._context
        context.lifecycle.drain()
        logger.info("draining for up to %g s", timeout)
        if not await context.lifecycle.drained(timeout):
            logger.warning("aborting the requests that still run")
        await context.engine.shutdown(0)
        self.should_exit = True


def make_server(app: FastAPI) -> DrainingServer:
    """Return a server, not running, for an application made by `create_app`."""
    context: Context = app.state.context
    settings = context.settings
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # Of h11's kind: the faster httptools does not bound the size of headers.
        http=partial(BoundedConnection, settings=settings),  # type: ignore[arg-type]
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]
        # The command line has set up logging for the whole process.
        log_config=None,
        # The application logs every request itself, without addresses and paths.
        access_log=False,
        timeout_graceful_shutdown=FLUSH_SECONDS,
        server_header=False,
    )
    return DrainingServer(config, context)


def serve(app: FastAPI) -> None:
    """Serve until SIGTERM or SIGINT; returns once everything has ended."""
    context: Context = app.state.context
    _allow_files(2 * context.settings.max_connections + OTHER_FILES)
    # Python's garbage collector would look at every object of the libraries again and again, which holds
    # up all threads for a fifth of a second each time.
    gc.collect()
    gc.freeze()
    make_server(app).run()


def _allow_files(wanted: int) -> None:
    """Let the process open as many files, or as many as the system lets it: often 1024 until one asks."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != allowed < wanted:
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
