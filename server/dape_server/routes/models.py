"""GET /v1/models and GET /v1/models/{name}."""

from __future__ import annotations

from fastapi import APIRouter

from dape_server.context import Context, ServerContext
from dape_server.errors import ErrorResponse
from dape_server.protocol.models import Model, ModelList

router = APIRouter()


@router.get("/v1/models")
async def list_models(context: ServerContext) -> ModelList:
    """List the served model."""
    return ModelList(data=[_model(context)])


@router.get("/v1/models/{name:path}", responses={404: {"model": ErrorResponse}})
async def get_model(name: str, context: ServerContext) -> Model:
    """Describe one model."""
    context.check_model(name)
    return _model(context)


def _model(context: Context) -> Model:
    return Model(
        id=context.model_name,
        created=context.started,
        root=context.engine.model_name,
        max_model_len=context.engine.max_model_len,
        train_length=context.engine.config.train_length,
    )
