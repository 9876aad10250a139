"""What the routes share: the engine, the settings, the metrics and the server's phase."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from anyio import CapacityLimiter
from fastapi import Depends, Request

from dape_engine.config import ModelConfig
from dape_engine.grammar import GrammarCompiler
from dape_engine.inspection import Inspection, InspectionRequest
from dape_engine.request import (
    EngineState,
    GenerationOutput,
    GenerationRequest,
    ScoreRequest,
    WindowScores,
)
from dape_engine.tokenizer import TextTokenizer
from dape_server.chat import ChatTemplate
from dape_server.errors import HttpError, shorten
from dape_server.lifecycle import Lifecycle
from dape_server.metrics import Metrics
from dape_server.settings import ServerSettings
from dape_server.text import TextService


class Engine(Protocol):
    """The part of `dape_engine.engine.AsyncEngine` that the server uses."""

    @property
    def config(self) -> ModelConfig:
        """The model's settings."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer."""

    @property
    def model_name(self) -> str:
        """Name of the model folder."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens."""

    @property
    def block_size(self) -> int:
        """Tokens of one cache block."""

    @property
    def dtype_name(self) -> str:
        """Dtype of the weights in memory, and whether they are quantised or made up."""

    @property
    def backend_name(self) -> str:
        """Name of the attention backend."""

    def start(self) -> None:
        """Start the engine's thread."""

    async def shutdown(self, drain_seconds: float) -> None:
        """Refuse new work, finish or abort the running work by the deadline, stop."""

    def state(self) -> EngineState:
        """Return a snapshot at once."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """Yield the outputs of one completion; closing aborts it."""

    def score(self, request: ScoreRequest) -> AsyncGenerator[WindowScores, None]:
        """Yield the scores of each window in order; closing aborts the rest."""

    async def inspect(self, request: InspectionRequest) -> Inspection:
        """Return what one query sees of its keys; cancelling aborts it."""


@dataclass(frozen=True, slots=True)
class Context:
    """One server's parts."""

    engine: Engine
    settings: ServerSettings
    metrics: Metrics
    lifecycle: Lifecycle
    texts: TextService
    grammars: GrammarCompiler
    chat: ChatTemplate | None
    """None: the model has no chat template."""
    started: int
    """Unix time in seconds."""
    fingerprint: str
    """Of model, dtype, backend and version; see `fingerprint`."""
    compiling: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    """Grammars are compiled one at a time: each may take a core for a while."""

    @property
    def model_name(self) -> str:
        """The model's name in requests and answers."""
        return self.settings.served_model_name or self.engine.model_name

    def check_model(self, name: str | None) -> None:
        """Accept the served model's name, or none.

        Raises:
            HttpError: 404, the name is another.
        """
        if name is not None and name != self.model_name:
            raise HttpError(
                404,
                f"model: {shorten(name)!r} is not served here; {self.model_name!r} is",
                code="model_not_found",
                param="model",
            )


def fingerprint(engine: Engine, version: str) -> str:
    """Return the short hash of all that decides what the server answers."""
    parts = "\n".join(
        (engine.model_name, engine.config.model_dump_json(), engine.dtype_name, engine.backend_name, version)
    )
    return "fp_" + hashlib.sha256(parts.encode()).hexdigest()[:16]


async def _context(request: Request) -> Context:
    # FastAPI would call a plain function in a worker thread, for every request.
    context: Context = request.app.state.context
    return context


ServerContext = Annotated[Context, Depends(_context)]
