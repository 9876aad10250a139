"""The one place where failures become OpenAI's `{"error": {"message", "type", "param", "code"}}`.

Messages name the field, the limit and the value. They never hold text of the request beyond a field's
name, a number or a model's name, and never anything of the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dape_engine.errors import DapeError, QueueFullError, RequestError
from dape_server.limits import RETRY_SECONDS
from dape_server.request_context import note_error

SHOWN_CHARS = 64


class ErrorBody(BaseModel):
    """What went wrong, for people and programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorBody


class HttpError(DapeError):
    """A refusal of the HTTP layer itself, with its status."""

    kind = "invalid_request_error"

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None):
        super().__init__(message, param=param, code=code)
        self.status = status


class UnavailableError(DapeError):
    """The server is starting or stopping and takes no work."""

    status = 503
    code = "unavailable"


def headers_too_large(what: str) -> HttpError:
    """Return the refusal of a request's line and headers."""
    return HttpError(431, f"headers: {what}", code="headers_too_large")


def slow_request(message: str) -> HttpError:
    """Return the refusal of a request that has not come in time."""
    return HttpError(408, message, code="request_timeout")


def error_body(error: DapeError) -> dict[str, Any]:
    """Return the JSON envelope of an error."""
    note_error(error.code)
    body = ErrorBody(message=error.message, type=error.kind, param=error.param, code=error.code)
    return ErrorResponse(error=body).model_dump()


def error_response(error: DapeError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the HTTP answer to an error."""
    extra = dict(headers or {})
    if isinstance(error, QueueFullError):
        extra["Retry-After"] = str(error.retry_after)
    elif error.status == 503:
        extra["Retry-After"] = str(RETRY_SECONDS)
    return JSONResponse(error_body(error), error.status, extra)


def internal_error() -> DapeError:
    """Return what a client may know of a defect: nothing."""
    return DapeError("internal error; the server's log has the details")


def install_handlers(app: FastAPI) -> None:
    """Make refusals of the app's routes answer with the envelope."""

    @app.exception_handler(DapeError)
    async def on_dape_error(_: Request, error: DapeError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return error_response(HttpError(error.status_code, str(error.detail), code=code), error.headers)


def _validation_error(errors: Sequence[Any]) -> RequestError:
    """Describe the first of pydantic's findings."""
    first = errors[0]
    kind = first["type"]
    if kind == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    location = first["loc"][1:]
    if not location:
        message = "the body is empty" if kind == "missing" else "the body must be a JSON object"
        return RequestError(message, code="invalid_body")
    place, param = _place(location), _place([part for part in location if isinstance(part, str)])
    if kind == "missing":
        return RequestError(f"{place}: this field is required", param=param, code="missing_field")
    if kind == "extra_forbidden":
        return RequestError(f"{place}: unknown field", param=param, code="unknown_field")
    return RequestError(f"{place}: {first['msg'].removeprefix('Input ')}{_got(first['input'])}", param=param)


def _place(location: Sequence[str | int]) -> str:
    """Write a location as OpenAI does: `stop[3]`, `stream_options.include_usage`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return shorten(path.removeprefix("."))


def _got(value: object) -> str:
    """Name a refused number; other values are not repeated."""
    if isinstance(value, (bool, int, float)):
        return f", got {shorten(repr(value))}"
    return ""


def shorten(text: str) -> str:
    """Cut a client's text to a length that is safe to repeat, control characters escaped."""
    printable = text[: SHOWN_CHARS + 1].encode("unicode_escape").decode("ascii")
    return printable if len(printable) <= SHOWN_CHARS else printable[: SHOWN_CHARS - 3] + "..."
