"""Worker processes of sweeps: how they are made, how they log, and how one takes a run for itself."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPAWNING = multiprocessing.get_context("spawn")


def log_from_here() -> None:
    """Let this process, a new one, log to its standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file, which the system gives up when the process dies, however it dies.

    Args:
        path: made where it is missing.
        wait: until another process has given it up; else the value tells whether it is held.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
