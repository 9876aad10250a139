"""The server's log: lines of text or of JSON on stderr, each with the name of its request.

One record is one line, and a line holds no control characters, whoever chose its words: nobody can
write lines of their own into the log. Prompts and keys are never logged; the messages of exceptions that
may quote a value, such as a KeyError's, appear at level debug only.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Literal, TypeAlias

from dape_engine.errors import DapeError
from dape_server.request_context import request_id

LogFormat: TypeAlias = Literal["text", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
OF_THE_SYSTEM: Final = (DapeError, RuntimeError, OSError, MemoryError)
"""Exceptions whose messages speak of the program or the machine, not of the data."""
INNERMOST: Final = 12
"""Calls shown of an exception."""
QUIET: Final = ("httpcore", "httpx", "urllib3", "asyncio")
"""Libraries that log every detail at level debug."""


class LineFormatter(logging.Formatter):
    """Formats a record as one line of text: time, level, logger, request, message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        name = request_id()
        request = "" if name is None else f" [{name}]"
        line = f"{_time(record)} {record.levelname} {record.name}{request}: {record.getMessage()}"
        if trace := _trace(record):
            line += " | " + trace
        return UNSAFE.sub(_escaped, line)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, with the fields that the record carries in `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (name := request_id()) is not None:
            entry["request_id"] = name
        entry |= getattr(record, "fields", {})
        if trace := _trace(record):
            entry["exception"] = trace
        return json.dumps(entry, default=str)


def configure(log_format: LogFormat, level: LogLevel) -> None:
    """Send every log of the process, uvicorn's too, to stderr in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else LineFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    for name in QUIET:
        logging.getLogger(name).setLevel(max(root.level, logging.INFO))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _trace(record: logging.LogRecord) -> str:
    """Return the record's exception and where it was raised, innermost call last; "" without one."""
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    links: list[str] = []
    error: BaseException | None = record.exc_info[1]
    while error is not None and len(links) < 8:
        links.append(f"{_calls(error.__traceback__)} {_described(error)}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return " <- ".join(links)


def _calls(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)[-INNERMOST:]
    return " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)


def _described(error: BaseException) -> str:
    if isinstance(error, OF_THE_SYSTEM) or logging.getLogger().isEnabledFor(logging.DEBUG):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
