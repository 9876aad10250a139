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
from fastapi import Request, Response
from fastapi.routing import APIRoute

from dape_server.errors import HttpError


class StrictRequest(Request):
    """A request whose body is read by a strict JSON parser."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            JSONDecodeError: the body is not JSON, or not unambiguously.
        """
        body = await self.body()
        try:
            return jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
        except ValueError as error:
            # The parser quotes a duplicate key; a client's text is not repeated.
            reason = "duplicate key" if "duplicate key" in str(error) else str(error)
            raise json.JSONDecodeError(reason, "", 0) from None


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


def _check_content_type(request: Request) -> None:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind = header.get_content_type()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HttpError(415, "content-type: must be application/json", code="unsupported_media_type")
