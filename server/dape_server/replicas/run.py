"""A server over replicas, from its start to its end: SIGHUP replaces them, SIGTERM ends it all."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

from dape_engine.options import EngineOptions
from dape_server.app import create_app
from dape_server.replicas.cluster import Cluster
from dape_server.replicas.settings import ReplicaSettings
from dape_server.run import serve
from dape_server.settings import ServerSettings

logger = logging.getLogger(__name__)


def run(folder: Path, options: EngineOptions, settings: ServerSettings, replicas: ReplicaSettings) -> None:
    """Start the replicas and serve until SIGTERM or SIGINT.

    Args:
        folder: of the model.
        options: of the engines.
        settings: of the server.
        replicas: how many, and where.

    Raises:
        SettingsError: Ray or a replica cannot be started.
    """
    cluster = Cluster(folder, options, settings, replicas)
    try:
        engine, metrics = cluster.start()
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=cluster.restart, daemon=True).start())
        logger.info(
            "%s: %d replicas, attention %s, up to %d tokens a request",
            engine.model_name,
            replicas.replicas,
            engine.backend_name,
            engine.max_model_len,
        )
        logger.info("serving on http://%s:%d", settings.host, settings.port)
        # The engines' work is told in the log by the replicas.
        serve(create_app(engine, settings.model_copy(update={"log_stats_interval": 0}), metrics))
    finally:
        cluster.stop()
