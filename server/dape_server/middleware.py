"""What surrounds every route, from the outside in: headers, key, admission, body.

Plain ASGI, so that answers stream through unbuffered and one place cancels the work of a client that
has left.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dape_engine.errors import DapeError
from dape_server.errors import (
    HttpError,
    UnavailableError,
    error_response,
    headers_too_large,
    slow_request,
)
from dape_server.lifecycle import Lifecycle
from dape_server.limits import MAX_DISCARDED_BYTES, MAX_HEADER_BYTES, MAX_HEADERS

logger = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/health"})
PAGE = ("/", "/assets/")
"""Where browsers go by themselves: they are asked for a name, any one, and for a password, the key."""
CROWDED = "crowded"
"""Key of the scope's state that is true on connections above the server's limit."""
CLOSE = {"Connection": "close"}


class RequireKey:
    """Refuses requests without one of the keys, on every path but that of health."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]):
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._knows(scope):
            return await self.app(scope, receive, send)
        error = HttpError(401, "authorization: a valid key is required", code="invalid_api_key")
        is_page = scope["path"] == PAGE[0] or scope["path"].startswith(PAGE[1])
        challenge = 'Basic realm="API key as password", charset="UTF-8"' if is_page else "Bearer"
        await error_response(error, {"WWW-Authenticate": challenge})(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() == b"basic":
            key = _password(key)
        digest = hashlib.sha256(key.strip()).digest()
        # Digests are of one length and all of them are compared: the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() not in (b"bearer", b"basic") or not any(matches):
            return False
        # Whose request it is, for those who share the engine out: never the key itself.
        scope.setdefault("state", {})["tenant"] = digest.hex()
        return True


def _password(credentials: bytes) -> bytes:
    """Return the password of a browser's credentials, empty where there is none."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


class BoundHeaders:
    """Refuses requests whose headers are too many, too large or ambiguous, whichever parser took them."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = scope["headers"]
        size = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS:
            error = headers_too_large(f"{len(headers)} are above the limit of {MAX_HEADERS}")
        elif size > MAX_HEADER_BYTES:
            error = headers_too_large(f"{size} bytes are above the limit of {MAX_HEADER_BYTES}")
        elif {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            # A proxy before this server could see another end of the body, and a request behind it.
            message = "content-length: cannot be combined with transfer-encoding"
            error = HttpError(400, message, code="invalid_http")
        else:
            return await self.app(scope, receive, send)
        await error_response(error, CLOSE)(scope, receive, send)


class AdmitWork:
    """Refuses work (every POST) while the server starts, drains or has too many clients; counts the rest."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle):
        self.app = app
        self.lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if scope["state"].get(CROWDED):
            error = UnavailableError("max_connections: too many clients are connected", code="overloaded")
            return await error_response(error, CLOSE)(scope, receive, send)
        try:
            self.lifecycle.admit()
        except UnavailableError as error:
            return await error_response(error)(scope, receive, send)
        try:
            await self.app(scope, receive, send)
        finally:
            self.lifecycle.release()


class OwnBody:
    """Reads the body within bounds, then runs the request until it ends or its client has left.

    Args:
        app: sees complete bodies only.
        limit: bytes of one body.
        total: bytes of the bodies of all requests under way.
        timeout: seconds for one body to come.
    """

    def __init__(self, app: ASGIApp, limit: int, total: int, timeout: float):
        self.app = app
        self.limit = limit
        self.total = total
        self.timeout = timeout
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = bytearray()
        try:
            async with asyncio.timeout(self.timeout):
                complete = await self._read(Headers(scope=scope), receive, body)
        except TimeoutError:
            self._held -= len(body)
            error = slow_request(f"body: not complete after {self.timeout:g} s")
            return await error_response(error, CLOSE)(scope, receive, send)
        except DapeError as error:
            self._held -= len(body)
            return await error_response(error, CLOSE)(scope, receive, send)
        try:
            if complete:
                await _run_until_disconnect(self.app, scope, bytes(body), receive, send)
        finally:
            self._held -= len(body)

    async def _read(self, headers: Headers, receive: Receive, body: bytearray) -> bool:
        """Append to the body until it is complete; False if the client left before.

        Raises:
            HttpError, UnavailableError: the body is refused; what comes of it soon has been read, because
                a client that is still sending would not see the answer.
        """
        refusal: DapeError | None = None
        if headers.get("content-encoding", "identity").lower() != "identity":
            refusal = HttpError(415, "content-encoding: must be identity", code="unsupported_encoding")
        more, discarded = True, 0
        while more and discarded <= MAX_DISCARDED_BYTES:
            part = await receive()
            if part["type"] == "http.disconnect":
                return False
            more = part.get("more_body", False)
            refusal = refusal or self._take(part.get("body", b""), body)
            if refusal is not None:
                discarded += len(part.get("body", b""))
        if refusal is not None:
            raise refusal
        return True

    def _take(self, part: bytes, body: bytearray) -> DapeError | None:
        """Append a part of the body, or return why it is refused."""
        if (size := len(body) + len(part)) > self.limit:
            message = f"body: {size} bytes and more are above the limit of {self.limit}"
            return HttpError(413, message, code="body_too_large")
        if self._held + len(part) > self.total:
            message = f"max_total_body_size: the requests under way have {self._held} bytes already"
            return UnavailableError(message, code="overloaded")
        body += part
        self._held += len(part)
        return None


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
