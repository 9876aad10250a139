"""A request on its way to a replica, in a form that another machine understands."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from dape_engine.errors import DapeError
from dape_engine.grammar import GrammarCompiler
from dape_engine.inspection import InspectionRequest
from dape_engine.request import GenerationRequest, ScoreRequest

Request = GenerationRequest | ScoreRequest | InspectionRequest


@dataclass(frozen=True, slots=True)
class Order:
    """A request without what only its own process can read."""

    request: Request
    """Without a deadline, which the monotonic clock of another machine does not know, and without grammar."""
    expires: float | None
    """Unix time of the deadline."""
    grammar: tuple[str, str] | None = None
    """Text and field of the constraint."""
    avoid: frozenset[str] = field(default=frozenset())
    """Replicas that have refused the request."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The end of an answer that has failed."""

    error: DapeError
    replica: str
    """Whose it is."""


def pack(request: Request) -> Order:
    """Return the order for a request of this process."""
    deadline = request.scheduling.deadline
    expires = None if deadline is None else deadline + time.time() - time.monotonic()
    grammar = None
    if isinstance(request, GenerationRequest) and request.constraint is not None:
        # Of its state only the text is told: every attempt begins at the beginning.
        grammar = request.constraint.text, request.constraint.field
        request = replace(request, constraint=None)
    return Order(replace(request, scheduling=replace(request.scheduling, deadline=None)), expires, grammar)


def unpack(order: Order, grammars: GrammarCompiler) -> Request:
    """Return the request of an order, fit for this process. A grammar takes milliseconds, at worst a second.

    Raises:
        RequestError: the grammar is not understood.
    """
    request = order.request
    if order.expires is not None:
        deadline = order.expires - time.time() + time.monotonic()
        request = replace(request, scheduling=replace(request.scheduling, deadline=deadline))
    if order.grammar is not None and isinstance(request, GenerationRequest):
        return replace(request, constraint=grammars.compile_text(*order.grammar).constraint())
    return request
