"""Ray: one that runs already, or one of our own that ends with this process."""

from __future__ import annotations

from typing import Final

import ray

from dape_engine.errors import SettingsError

OBJECT_STORE_BYTES: Final = 256 << 20
"""Shared memory of a Ray of our own; answers above 100 KiB go through it."""


def connect(address: str | None, num_cpus: int) -> None:
    """Connect to the cluster at an address, or start one of this machine alone.

    Args:
        address: as of `ray.init`; None: our own.
        num_cpus: that our own gives away; more than the machine's are fine.

    Raises:
        SettingsError: there is no cluster, or it cannot be started.
    """
    try:
        if address is not None:
            ray.init(address, configure_logging=False)
        else:
            ray.init(
                "local",
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                configure_logging=False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "Ray" if address is None else f"--ray-address {address}"
        raise SettingsError(f"{where}: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """Return what an error of Ray says at its end, where the cause stands."""
    return str(error).strip().splitlines()[-1].strip()
