"""The keys that clients may use: from the settings, the environment and a file."""

from __future__ import annotations

import logging
from pathlib import Path

from dape_engine.errors import SettingsError
from dape_server.settings import ServerSettings

logger = logging.getLogger(__name__)
OTHERS = 0o077
"""Permission bits of everyone but a file's owner."""


def accepted_keys(settings: ServerSettings) -> list[str]:
    """Return all keys; without any, every client is served.

    Raises:
        SettingsError: the file cannot be read or holds no key, which would open the server to everyone.
    """
    keys = [key.get_secret_value() for key in settings.api_key]
    return keys if settings.api_key_file is None else keys + _keys_of(settings.api_key_file)


def _keys_of(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        shared = path.stat().st_mode & OTHERS
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"--api-key-file {path}: {reason}") from error
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        raise SettingsError(f"--api-key-file {path}: holds no key")
    if shared:
        logger.warning("others than its owner may use %s: chmod 600 mends that", path)
    return keys
