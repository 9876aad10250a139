"""Reading settings and model folders: of these, regular files and links to them, so that every read ends."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import yaml

from dape_engine.errors import ModelFolderError, SettingsError


def check_regular(path: Path) -> None:
    """Accept a file or a link to one, as the caches of hubs are made of.

    Raises:
        ModelFolderError: there is nothing, or a folder, a pipe or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelFolderError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelFolderError(f"cannot read {str(path)!r}: {error}") from error
    if not stat.S_ISREG(mode):
        raise ModelFolderError(f"cannot read {path}: it is not a regular file")


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ModelFolderError: it cannot be read, or it is not UTF-8.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFolderError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"{path} is not UTF-8: {error.reason}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ModelFolderError: it cannot be read, or it is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """Return the entries of a YAML file by name; of an empty file none.

    Raises:
        SettingsError: it cannot be read, it is not YAML, or it holds something else.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise SettingsError(f"{path} must hold settings by name")
    return entries
