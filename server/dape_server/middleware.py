"""What surrounds every route, from the outside in: request id and metrics, key, admission, body.

Plain ASGI, so that answers stream through unbuffered and one place cancels the work of a client that
has left.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dape_server.errors import HttpError, UnavailableError, error_response, internal_error
from dape_server.lifecycle import Lifecycle
from dape_server.metrics import Metrics

logger = logging.getLogger(__name__)
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CLIENT_CLOSED_REQUEST = 499
OPEN_PATHS = frozenset({"/health"})


class ObserveRequests:
    """Echoes a sane X-Request-Id or makes one, answers defects, measures requests to their last byte."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if SANE_REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        status = unanswered = CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        started = time.monotonic()
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s has failed", request_id)
            if status != unanswered:
                raise
            await error_response(internal_error())(scope, receive, send_with_id)
        finally:
            # Only templates of known routes become labels: a client must not be able to add series.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.on_http(route, scope["method"], status, time.monotonic() - started)


class RequireKey:
    """Refuses requests without one of the keys, on every path but /health."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]):
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._knows(scope):
            return await self.app(scope, receive, send)
        error = HttpError(401, "authorization: a valid key is required", code="invalid_api_key")
        await error_response(error)(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Digests are of one length and all of them are compared: the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class AdmitWork:
    """Refuses work (every POST) while the server starts or drains, and counts what is under way."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle):
        self.app = app
        self.lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        try:
            self.lifecycle.admit()
        except UnavailableError as error:
            return await error_response(error)(scope, receive, send)
        try:
            await self.app(scope, receive, send)
        finally:
            self.lifecycle.release()


class OwnBody:
    """Reads the body up to a limit, then runs the request until it ends or its client has left."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await self._read(Headers(scope=scope), receive)
        except HttpError as error:
            # The rest of the body is not read, so the connection cannot be used again.
            return await error_response(error, {"Connection": "close"})(scope, receive, send)
        if body is not None:
            await _run_until_disconnect(self.app, scope, body, receive, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body, or None if the client left before its end."""
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise HttpError(415, "content-encoding: must be identity", code="unsupported_encoding")
        body = bytearray()
        more = True
        while more:
            part = await receive()
            if part["type"] == "http.disconnect":
                return None
            body += part.get("body", b"")
            more = part.get("more_body", False)
            if len(body) > self.limit:
                message = f"body: {len(body)} bytes and more are above the limit of {self.limit}"
                raise HttpError(413, message, code="body_too_large")
        return bytes(body)


async def _run_until_disconnect(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Run the app on a complete body; cancel it as soon as the client disconnects."""
    parts: asyncio.Queue[Message] = asyncio.Queue()
    parts.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(app(scope, parts.get, send))
    watch = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not work.done():
            work.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)
    if not work.cancelled():
        work.result()
