"""Strict reading of JSON bodies: what two parsers could understand differently is refused.

Refused beyond broken JSON: NaN and Infinity, duplicate keys, a byte-order mark, bytes after the value,
invalid or over-long UTF-8, lone surrogates, nesting deeper than the parser's 200 levels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

import jiter
import numpy as np
from anyio import to_thread
from fastapi import Request, Response
from fastapi.routing import APIRoute

from dape_server.errors import HttpError
from dape_server.limits import MAX_JSON_LISTS, MAX_JSON_VALUES

LONG_BODY = 1 << 16
"""Bytes above which a body is parsed in a worker thread."""


class StrictRequest(Request):
    """A request whose body is read by a strict JSON parser."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            JSONDecodeError: the body is not JSON, or not unambiguously.
        """
        body = await self.body()
        if len(body) <= LONG_BODY:
            return _parse(body)
        return await to_thread.run_sync(_parse_long, body)


class JsonRoute(APIRoute):
    """A route that takes JSON bodies only, read strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind a check of the content type."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is not None:
                _check_content_type(request)
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def _parse_long(body: bytes) -> Any:
    """Parse a body whose values are counted first: no other thread runs while the parser builds them."""
    lists, values = count_values(body)
    for what, count, limit in (
        ("lists and objects", lists, MAX_JSON_LISTS),
        ("values", values, MAX_JSON_VALUES),
    ):
        if count > limit:
            raise json.JSONDecodeError(f"{count} {what} are above the limit of {limit}", "", 0)
    return _parse(body)


def _parse(body: bytes) -> Any:
    try:
        return jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError as error:
        # The parser quotes a duplicate key; a client's text is not repeated.
        reason = "duplicate key" if "duplicate key" in str(error) else str(error)
        raise json.JSONDecodeError(reason, "", 0) from None


def count_values(body: bytes) -> tuple[int, int]:
    """Return how many lists and objects JSON text opens, and an upper bound on its values in all.

    What stands within strings does not count.
    """
    # Without escapes every quote begins or ends a string.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    # NumPy lets other threads run while it goes through the bytes.
    letters = np.frombuffer(plain, np.uint8)
    outside = ~np.logical_xor.accumulate(letters == ord('"'))
    opened, commas = (
        sum(int(np.count_nonzero((letters == ord(sign)) & outside)) for sign in signs)
        for signs in ("[{", ",")
    )
    return opened, opened + commas + 1


def _check_content_type(request: Request) -> None:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind = header.get_content_type()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HttpError(415, "content-type: must be application/json", code="unsupported_media_type")
