"""GET /v1/models: OpenAI's list, with the lengths a client must know."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Model(BaseModel):
    """One model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dape-serve"
    root: str
    """Name of the model folder."""
    parent: None = None
    """No model is an adapter of another."""
    max_model_len: int
    """Longest prompt plus completion, in tokens."""
    train_length: int
    """Tokens of the sequences the model was trained on."""


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]
