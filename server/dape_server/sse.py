"""Server-sent events: a stream of JSON values that ends with `[DONE]`, whatever happens on the way.

While there is no news, not even the first, comments keep proxies and clients from closing the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import orjson
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from dape_engine.errors import DapeError
from dape_server.errors import error_body, internal_error

logger = logging.getLogger(__name__)
COMMENT: Message = {"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True}


class EventStream(StreamingResponse):
    """A response that closes its events however it ends: this is what aborts the engine's work."""

    media_type = "text/event-stream"

    def __init__(self, first: asyncio.Task[bytes], events: AsyncGenerator[bytes, None], ping_interval: float):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_framed(first, events), headers=headers)
        self._first = first
        self._events = events
        self._ping_interval = ping_interval
        self._sending = False
        self._quiet = False

    @classmethod
    async def open(cls, events: AsyncGenerator[bytes, None], ping_interval: float) -> EventStream:
        """Wait for the first event, so that a refusal still gets a status of its own.

        Args:
            events: JSON texts.
            ping_interval: seconds without an event after which a comment is sent; the stream begins then
                at the latest, and an error after that is its last event.
        """
        first = asyncio.ensure_future(anext(events))
        try:
            await asyncio.wait({first}, timeout=ping_interval)
            if first.done():
                first.result()
        except BaseException:
            await _close(first, events)
            raise
        return cls(first, events, ping_interval)

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the events; the middleware cancels this when the client leaves."""
        pings: asyncio.Task[None] | None = None
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            pings = asyncio.ensure_future(self._ping(send))
            async for part in self.body_iterator:
                self._sending = True
                await send({"type": "http.response.body", "body": part, "more_body": True})
                self._sending = self._quiet = False
            self._sending = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if pings is not None:
                pings.cancel()
            await _close(self._first, self._events)

    async def _ping(self, send: Send) -> None:
        """Send comments while nothing else is sent, and nothing waits for a slow reader."""
        # The time before the status line may have been as quiet.
        self._quiet = not self._first.done()
        while True:
            if self._quiet and not self._sending:
                await send(COMMENT)
            self._quiet = True
            await asyncio.sleep(self._ping_interval)


async def _close(first: asyncio.Task[bytes], events: AsyncGenerator[bytes, None]) -> None:
    """Abort the events, also while the first of them is waited for."""
    if not first.done():
        first.cancel()
        await asyncio.wait({first})
    await events.aclose()


async def _framed(first: asyncio.Task[bytes], events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    try:
        yield _event(await first)
        async for event in events:
            yield _event(event)
    except DapeError as error:
        yield _event(orjson.dumps(error_body(error)))
    except Exception:
        logger.exception("a stream has failed")
        yield _event(orjson.dumps(error_body(internal_error())))
    yield _event(b"[DONE]")


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
