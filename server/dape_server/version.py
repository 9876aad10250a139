"""The version of the package."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    """Return the installed version, "unknown" where the package is not installed."""
    try:
        return metadata.version("dape-serve")
    except metadata.PackageNotFoundError:
        return "unknown"
