"""Server-sent events: a stream of JSON values that ends with `[DONE]`, whatever happens on the way."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import orjson
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dape_engine.errors import DapeError
from dape_server.errors import error_body, internal_error

logger = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """A response that closes its events however it ends: this is what aborts the engine's work."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_framed(first, events), headers=headers)
        self._events = events

    @classmethod
    async def open(cls, events: AsyncGenerator[bytes, None]) -> EventStream:
        """Wait for the first event, so that a refusal still gets a status of its own.

        Args:
            events: JSON texts.
        """
        return cls(await anext(events), events)

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the events; the middleware cancels this when the client leaves."""
        async with aclosing(self._events):
            await self.stream_response(send)


async def _framed(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    yield _event(first)
    try:
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
