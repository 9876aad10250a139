"""GET /health, /ready, /version and /metrics. None of them waits for the engine."""

from __future__ import annotations

from importlib import metadata

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from dape_engine.request import EngineState
from dape_server.context import Context, ServerContext
from dape_server.errors import UnavailableError, error_response
from dape_server.lifecycle import Phase

router = APIRouter()


@router.get("/health")
async def health(context: ServerContext) -> JSONResponse:
    """Answer 200 while the engine lives: its thread runs, and works when there is work."""
    if (trouble := _trouble(context, context.engine.state())) is not None:
        return error_response(UnavailableError(trouble, code="unhealthy"))
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(context: ServerContext) -> JSONResponse:
    """Answer 200 while requests are taken; 503 while the server starts or drains, or is not healthy."""
    phase = context.lifecycle.phase
    if phase is not Phase.READY:
        return error_response(UnavailableError(f"the server is {phase}", code=phase))
    return await health(context)


def _trouble(context: Context, state: EngineState) -> str | None:
    if state.failure is not None:
        return state.failure
    if state.stopped and context.lifecycle.phase is Phase.READY:
        return "the engine has stopped"
    limit = context.settings.health_timeout
    if state.seconds_since_progress > limit:
        return f"no step has ended for {state.seconds_since_progress:.0f} s, the limit is {limit:.0f} s"
    return None


@router.get("/version")
async def version() -> dict[str, str]:
    """Return the version of the package."""
    try:
        return {"version": metadata.version("dape-serve")}
    except metadata.PackageNotFoundError:
        return {"version": "unknown"}


@router.get("/metrics")
async def metrics(context: ServerContext) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(context.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
