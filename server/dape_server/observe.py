"""The outermost layer of the application: names each request, then counts, logs and traces it.

Answers defects too: whatever no other layer has caught becomes a 500 here.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import nullcontext
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dape_server.errors import error_response, internal_error
from dape_server.limits import REQUEST_ID
from dape_server.metrics import Exchange, Metrics
from dape_server.request_context import CURRENT, ERROR_CODE

if TYPE_CHECKING:
    from dape_server.tracing import Tracing

logger = logging.getLogger(__name__)
access = logging.getLogger("dape_server.access")
SANE_REQUEST_ID = re.compile(REQUEST_ID)
CLIENT_CLOSED_REQUEST = 499
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines; their successes are logged at level debug only."""
TENANT_CHARS = 8
"""Of the digest of a key, enough to tell tenants apart in a log and too few to find the key."""


class ObserveRequests:
    """Echoes a sane X-Request-Id or makes one, and measures requests to their last byte.

    Args:
        app: what is observed.
        metrics: count every request.
        tracing: gives every request a span; None: nothing is traced.
        log_access: whether every request gets a line in the log.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None, log_access: bool):
        self.app = app
        self.metrics = metrics
        self.tracing = tracing
        self.log_access = log_access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event stream, as ASGI defines it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        sane = SANE_REQUEST_ID.fullmatch(asked) is not None
        # A body may still name the request where the header does not; see `dape_server.scheduling`.
        state = scope.setdefault("state", {})
        state |= {"request_id": asked if sane else uuid.uuid4().hex, "request_id_given": sane}
        counted = _Counted(receive, send, state)
        started = time.monotonic()
        token = CURRENT.set(state)
        try:
            with nullcontext() if self.tracing is None else self.tracing.request(headers) as span:
                try:
                    await self._answer(scope, counted)
                finally:
                    exchange = counted.exchange(scope, time.monotonic() - started)
                    self.metrics.on_http(exchange)
                    if self.log_access:
                        _log(exchange, state)
                    if self.tracing is not None and span is not None:
                        self.tracing.describe(span, exchange, state["request_id"])
        finally:
            CURRENT.reset(token)

    async def _answer(self, scope: Scope, counted: _Counted) -> None:
        try:
            await self.app(scope, counted.receive, counted.send)
        except Exception:
            logger.exception("the request has failed")
            if counted.status is not None:
                raise
            await error_response(internal_error())(scope, counted.receive, counted.send)


class _Counted:
    """One request's ASGI channels, and what has gone through them."""

    def __init__(self, receive: Receive, send: Send, state: dict[str, object]):
        self._receive = receive
        self._send = send
        self._state = state
        self._received = self._sent = 0
        self.status: int | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = str(self._state["request_id"])
        await self._send(message)
        self._sent += len(message.get("body", b""))

    def exchange(self, scope: Scope, seconds: float) -> Exchange:
        error = self._state.get(ERROR_CODE)
        return Exchange(
            # Only templates of known routes become labels: a client must not be able to add series.
            route=getattr(scope.get("route"), "path", "other"),
            method=scope["method"] if scope["method"] in METHODS else "other",
            status=CLIENT_CLOSED_REQUEST if self.status is None else self.status,
            seconds=seconds,
            received=self._received,
            sent=self._sent,
            error=None if error is None else str(error),
        )


def _log(exchange: Exchange, state: dict[str, object]) -> None:
    fields = {
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "seconds": round(exchange.seconds, 6),
        "error_code": exchange.error,
        "tenant": str(state["tenant"])[:TENANT_CHARS] if "tenant" in state else None,
    }
    access.log(
        logging.DEBUG if exchange.route in PROBES and exchange.status == 200 else logging.INFO,
        "%s %s %d in %.3f s",
        exchange.method,
        exchange.route,
        exchange.status,
        exchange.seconds,
        extra={"fields": {name: value for name, value in fields.items() if value is not None}},
    )
