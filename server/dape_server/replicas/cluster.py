"""Ray, the deployment of the replicas on it, and their rolling restart."""

from __future__ import annotations

import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_server.replicas.connect import connect, last_line
from dape_server.replicas.engine import ReplicatedEngine
from dape_server.replicas.metrics import FrontMetrics
from dape_server.replicas.replica import Description, EngineReplica
from dape_server.replicas.reports import Reports
from dape_server.replicas.settings import ReplicaSettings
from dape_server.settings import ServerSettings

logger = logging.getLogger(__name__)
APPLICATION = "dape"
HEALTH_PERIOD = 2.0
"""Seconds between two questions of Ray Serve to a replica, and thus until a dead one is replaced."""
SLACK_SHARE = 0.25
"""Of max_num_seqs: requests that a replica may have more than others and still get those of its prefixes."""
CONTROL_REQUESTS = 16
"""Requests at once to a replica that are not for its engine."""
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 10.0, 120.0
"""How long there must be too much, or too little, work before replicas are added, or taken away."""
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Ray Serve would log a line for every call."""


class Cluster:
    """The replicas of one server.

    Args:
        folder: of the model; on a cluster of several machines, on each of them.
        options: of the engines.
        settings: of the server.
        replicas: how many, and where.

    Raises:
        SettingsError: the numbers of replicas contradict each other, or the cluster cannot be reached.
    """

    def __init__(
        self, folder: Path, options: EngineOptions, settings: ServerSettings, replicas: ReplicaSettings
    ):
        self._folder = folder.resolve()
        self._settings = settings
        self._replicas = replicas
        self._restarting = threading.Lock()
        cores = os.cpu_count() or 1
        _check(replicas)
        connect(replicas.ray_address, max(cores, math.ceil(_cpus(replicas, cores) * replicas.most)))
        on_gpu = options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        if options.threads is None and not on_gpu and replicas.ray_address is None:
            options = options.model_copy(update={"threads": max(1, cores // replicas.most)})
        self._options = options
        self._resources = {"num_cpus": _cpus(replicas, cores), "num_gpus": 1 if on_gpu else 0}

    def start(self) -> tuple[ReplicatedEngine, FrontMetrics]:
        """Start the replicas, and return them as one engine with its metrics.

        Raises:
            SettingsError: a replica cannot be started.
        """
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        handle = self._deploy()
        description: Description = handle.describe.remote().result()
        reports = Reports(handle)
        name = self._settings.served_model_name or self._folder.name
        metrics = FrontMetrics(name, reports.families)
        return (
            ReplicatedEngine(self._folder, self._options, handle, description, reports, metrics),
            metrics,
        )

    def restart(self) -> None:
        """Replace the replicas one after another; each finishes its requests first. Returns at the end."""
        if not self._restarting.acquire(blocking=False):
            logger.warning("the replicas are being replaced already")
            return
        try:
            logger.info("replacing the replicas one after another")
            self._deploy()
            logger.info("all replicas are new")
        except SettingsError as error:
            logger.error("the old replicas go on: %s", error.message)
        finally:
            self._restarting.release()

    def stop(self) -> None:
        """End the replicas, and Ray where it was started here."""
        if self._replicas.ray_address is None:
            serve.shutdown()
        else:
            serve.delete(APPLICATION)
        ray.shutdown()

    def _deploy(self) -> Any:
        """Make the deployment what it should be, with new replicas, and return a handle of it."""
        settings, options, replicas = self._settings, self._options, self._replicas
        wanted: dict[str, Any] = {"num_replicas": replicas.replicas}
        if replicas.most > replicas.fewest:
            wanted = {
                "autoscaling_config": {
                    "min_replicas": replicas.fewest,
                    "initial_replicas": replicas.replicas,
                    "max_replicas": replicas.most,
                    "target_ongoing_requests": replicas.target_requests or options.max_num_seqs,
                    "look_back_period_s": UPSCALE_SECONDS,
                    "upscale_delay_s": UPSCALE_SECONDS,
                    "downscale_delay_s": DOWNSCALE_SECONDS,
                }
            }
        routing = RequestRouterConfig(
            request_router_class="dape_server.replicas.router.PrefixRouter",
            request_router_kwargs={
                "block_size": options.block_size,
                "slack": math.ceil(SLACK_SHARE * options.max_num_seqs),
            },
        )
        deployment = serve.deployment(
            EngineReplica,
            ray_actor_options=self._resources,
            # The engine's own queue refuses, so that tenants get what is theirs.
            max_ongoing_requests=2 * (options.max_num_seqs + options.max_num_queued_reqs) + CONTROL_REQUESTS,
            # Of requests that wait because there is no replica at the moment.
            max_queued_requests=options.max_num_queued_reqs,
            health_check_period_s=HEALTH_PERIOD,
            # As long as /health bears it. A dead process is noticed at once nevertheless.
            health_check_timeout_s=settings.health_timeout,
            graceful_shutdown_wait_loop_s=0.2,
            # A replica that is replaced finishes its requests, none of which may take longer.
            graceful_shutdown_timeout_s=settings.request_timeout,
            max_constructor_retry_count=2,
            request_router_config=routing,
            logging_config=QUIET,
            **wanted,
        )
        application = deployment.bind(self._folder, options, settings)
        try:
            return serve.run(application, name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            raise SettingsError(f"the replicas cannot be started: {last_line(error)}") from error


def _check(replicas: ReplicaSettings) -> None:
    if not replicas.fewest <= (replicas.replicas or 1) <= replicas.most:
        raise SettingsError(
            f"--replicas {replicas.replicas}: must be from --min-replicas {replicas.fewest} "
            f"to --max-replicas {replicas.most}"
        )


def _cpus(replicas: ReplicaSettings, cores: int) -> float:
    """Return the CPUs of a replica; from 1 on, Ray knows whole ones only."""
    if replicas.replica_cpus is not None:
        return replicas.replica_cpus
    share = cores / replicas.most if replicas.ray_address is None else 1
    return math.floor(share) if share >= 1 else round(share, 3)
