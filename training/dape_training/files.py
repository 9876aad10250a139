"""Files and folders that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end of the block it becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
        _to_disk(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")


def publish_folder(new: Path, path: Path) -> None:
    """Give a finished folder its name, which must not exist yet."""
    for file in new.rglob("*"):
        if file.is_file():
            _to_disk(file)
    new.rename(path)


def remove_folder(path: Path) -> None:
    """Remove a folder with all it holds; none is fine."""
    shutil.rmtree(path, ignore_errors=True)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
