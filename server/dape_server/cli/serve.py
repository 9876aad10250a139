"""`dape serve`: the HTTP server."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import click

from dape_engine.engine import AsyncEngine
from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_server.app import create_app
from dape_server.cli.options import build_settings, config_option, settings_options
from dape_server.health import open_listener
from dape_server.logs import configure
from dape_server.metrics import Metrics
from dape_server.replicas.settings import ReplicaSettings
from dape_server.run import serve as run
from dape_server.settings import ServerSettings

logger = logging.getLogger(__name__)


@click.command()
@click.argument("model", default=DEFAULT_MODEL, metavar="[MODEL]", envvar="DAPE_MODEL")
@config_option
@settings_options(ServerSettings)
@settings_options(EngineOptions)
@settings_options(ReplicaSettings)
def serve(model: str, **options: Any) -> None:
    """Serve MODEL, a folder or the name of a shipped model, over HTTP."""
    settings = build_settings(ServerSettings, options)
    configure(settings.log_format, "debug" if logging.root.level == logging.DEBUG else settings.log_level)
    # A port that another server has is told before the model is loaded, not after.
    open_listener(settings.host, settings.port, "--port").close()
    folder = resolve_model(model)
    engine_options = build_settings(EngineOptions, options)
    replicas = build_settings(ReplicaSettings, options)
    if replicas.replicas is not None:
        _replicas().run(folder, engine_options, settings, replicas)
        return
    if replicas != ReplicaSettings():
        [first, *_] = replicas.model_fields_set
        raise SettingsError(f"--{first.replace('_', '-')}: has no meaning without --replicas")
    metrics = Metrics(settings.served_model_name or folder.resolve().name)
    engine = AsyncEngine(folder, engine_options, metrics)
    logger.info(
        "%s: attention %s, %d blocks of %d tokens, up to %d tokens a request",
        engine.model_name,
        engine.backend_name,
        engine.num_blocks,
        engine.block_size,
        engine.max_model_len,
    )
    logger.info("serving on http://%s:%d", settings.host, settings.port)
    run(create_app(engine, settings, metrics))


def _replicas() -> Any:
    """Return the module that needs Ray, imported only where it is asked for."""
    try:
        return import_module("dape_server.replicas.run")
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"--replicas needs the package {error.name}; pip install 'dape-serve[ray]' installs it"
        ) from error
