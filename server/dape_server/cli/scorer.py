"""An engine that scores one document after another, here or in a worker of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dape_engine.engine import AsyncEngine
from dape_engine.errors import RequestError, SettingsError
from dape_engine.options import EngineOptions
from dape_server.cli.documents import Document
from dape_server.cli.score_log import Outcome
from dape_server.cli.score_rows import Row
from dape_server.cli.score_text import score_text


class Scorer:
    """Loads a model and scores documents; a document that cannot be scored is told, not raised.

    Args:
        folder: of the model.
        engine_options: of the engine.
        options: those of `dape score`.
    """

    def __init__(self, folder: Path, engine_options: EngineOptions, options: Mapping[str, Any]):
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._engine = AsyncEngine(folder, engine_options)
        self._engine.start()

    def __call__(self, document: Document) -> Outcome:
        """Return the sums of a document's rows, or what is wrong with it."""
        try:
            rows = score_text(self._engine, document.name, document.read(), self._options, _silent)
            sums = tuple(Row(row.label, row.statistics) for row in self._loop.run_until_complete(rows))
            return Outcome(document, sums)
        except (RequestError, SettingsError) as error:
            return Outcome(document, error=error.message)

    def close(self) -> None:
        """Stop the engine."""
        self._loop.run_until_complete(self._engine.shutdown(0))
        self._loop.close()


def _silent(_name: str, _done: int, _total: int) -> None:
    """Tell nothing of the parts of a document."""
