"""A request's place among the others: its name, whose it is, how urgent it is, and when it must end."""

from __future__ import annotations

import time
from itertools import count

from fastapi import Request

from dape_engine.errors import RequestError
from dape_engine.request import Scheduling
from dape_server.protocol.common import WorkBody
from dape_server.settings import ServerSettings

_serial = count()


def scheduling(
    body: WorkBody, request: Request, settings: ServerSettings, default_priority: int = 0
) -> Scheduling:
    """Return how the engine is to treat the work of a request; its time runs from now on.

    Args:
        body: the request's own wishes.
        request: the tenant is the digest of its key where the server has keys, else `user`.
        settings: the server's `request_timeout` bounds `timeout`.
        default_priority: where the body names none.

    Raises:
        RequestError: `timeout` is above the server's limit.
    """
    limit = settings.request_timeout
    if body.timeout is not None and body.timeout > limit:
        raise RequestError(f"timeout: {body.timeout:g} s is above the limit of {limit:g} s", param="timeout")
    return Scheduling(
        priority=default_priority if body.priority is None else body.priority,
        tenant=request.scope["state"].get("tenant", body.user or ""),
        cache_salt=body.cache_salt or "",
        deadline=time.monotonic() + (body.timeout or limit),
    )


def answer_id(kind: str, body: WorkBody, request: Request) -> str:
    """Return the id of a request's answer, such as `cmpl-` and the request's name.

    The name is that of the header X-Request-Id, else the body's, else one that the middleware made; it
    goes back in the header. Clients may use a name twice.

    Args:
        kind: what the answer is, as OpenAI abbreviates it.
    """
    state = request.scope["state"]
    if body.request_id is not None and not state["request_id_given"]:
        state["request_id"] = body.request_id
    return f"{kind}-{state['request_id']}"


def engine_id(answer: str) -> str:
    """Return a name for the engine's part of an answer that no other answer of this process has."""
    return f"{answer}#{next(_serial)}"
