"""GET /health, /ready, /version and /metrics. None of them waits for the engine."""

from __future__ import annotations

import platform
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from torch import __version__ as torch_version

from dape_kernels.cpu.library import LibraryMissingError, instruction_set
from dape_server.context import ServerContext
from dape_server.errors import ErrorResponse
from dape_server.health import health_answer, ready_answer
from dape_server.version import package_version

router = APIRouter()
UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"model": ErrorResponse}}


class Version(BaseModel):
    """What runs here."""

    version: str
    """Of this package."""
    model: str
    attention_backend: str
    instruction_set: str | None
    """Of the C++ kernels; null where they are not built."""
    python: str
    torch: str


@router.get("/health", responses=UNAVAILABLE)
async def health(context: ServerContext) -> JSONResponse:
    """Answer 200 while the engine lives: its thread runs, and works when there is work."""
    return health_answer(context)


@router.get("/ready", responses=UNAVAILABLE)
async def ready(context: ServerContext) -> JSONResponse:
    """Answer 200 while requests are taken; 503 while the server starts or drains, or is not healthy."""
    return ready_answer(context)


@router.get("/version")
async def version(context: ServerContext) -> Version:
    """Return the versions of the server and of what it runs on."""
    return Version(
        version=package_version(),
        model=context.model_name,
        attention_backend=context.engine.backend_name,
        instruction_set=_instruction_set(),
        python=platform.python_version(),
        torch=str(torch_version),
    )


def _instruction_set() -> str | None:
    try:
        return instruction_set()
    except LibraryMissingError:
        return None


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(context: ServerContext) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(context.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
