"""The request that the running code serves, for logs, errors and traces.

The value is a context variable, so tasks and worker threads started for a request see it, and so does
the engine's thread where it reports the request's end.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

CURRENT: ContextVar[dict[str, Any] | None] = ContextVar("dape_request", default=None)
"""The `state` of the request's scope: its request_id, its tenant, and the code of its error."""
ERROR_CODE = "error_code"


def request_id() -> str | None:
    """Return the name of the request being served; None outside of requests."""
    state = CURRENT.get()
    return None if state is None else state["request_id"]


def note_error(code: str) -> None:
    """Remember why the request being served is refused or has failed."""
    if (state := CURRENT.get()) is not None:
        state[ERROR_CODE] = code
