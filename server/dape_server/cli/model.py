"""The model argument and the engine that the local commands run in their own process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_engine.weights import CONFIG, DEFAULT_MODEL, SHIPPED, resolve_model
from dape_server.cli.options import build_settings


def split_model(arguments: tuple[str, ...], *, plain_folders: bool = False) -> tuple[Path, tuple[str, ...]]:
    """Take the model off the front of `[MODEL] REST...` where it is one; else the shipped model.

    The first argument is a model if it names a shipped one or a folder; with `plain_folders`, which others
    than models may be, a folder with a configuration.
    """
    first = arguments[0] if arguments else ""
    marker = CONFIG if plain_folders else "."
    places = (SHIPPED / first, Path(first))
    if first and any(place.is_dir() and (place / marker).exists() for place in places):
        return resolve_model(first), arguments[1:]
    return resolve_model(DEFAULT_MODEL), arguments


@asynccontextmanager
async def running_engine(folder: Path, options: dict[str, Any]) -> AsyncIterator[AsyncEngine]:
    """Yield a started engine and stop it at the end."""
    engine = AsyncEngine(folder, build_settings(EngineOptions, options))
    engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown(0)
