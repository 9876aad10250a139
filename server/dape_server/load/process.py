"""Server processes of a measurement: started on a free port, waited for, ended with the block."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

from dape_engine.errors import SettingsError

POLL_SECONDS = 0.05
START_SECONDS = 120
STOP_SECONDS = 30
SHOWN_LINES = 5


@contextmanager
def running(
    name: str, command: Sequence[str], port: int, ready: str, environment: Mapping[str, str]
) -> Iterator[tuple[str, int]]:
    """Run a server and yield its address and process id.

    Args:
        name: for messages.
        command: that starts it.
        port: that it listens on.
        ready: path that answers 200 once requests are taken.
        environment: of the process.

    Raises:
        SettingsError: it ended, or was not ready in time.
    """
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(f"{url}{ready}"):
                if process.poll() is not None:
                    raise SettingsError(f"{name} ended with exit code {process.returncode}: {_tail(log)}")
                if time.monotonic() > deadline:
                    raise SettingsError(f"{name} was not ready after {START_SECONDS} s: {_tail(log)}")
                time.sleep(POLL_SECONDS)
            yield url, process.pid
            if process.poll() is not None:
                raise SettingsError(f"{name} has ended with exit code {process.returncode}: {_tail(log)}")
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def dape_server(folder: Path, settings: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Run `dape serve` and yield its address and process id.

    Args:
        folder: of the model.
        settings: of server and engine, by their names.

    Raises:
        SettingsError: it cannot start with these settings.
    """
    port = free_port()
    given = {f"DAPE_{name.upper()}": str(value) for name, value in settings.items() if value is not None}
    command = [sys.executable, "-m", "dape_server", "serve", str(folder), "--port", str(port)]
    environment = {**os.environ, "DAPE_ACCESS_LOG": "0", **given}
    with running("dape serve", command, port, "/ready", environment) as server:
        yield server


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except (URLError, OSError):
        return False


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-SHOWN_LINES:]) or "it said nothing"
