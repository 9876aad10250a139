"""How long `dape serve` takes from the start of its process to the first token."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions

POLL_SECONDS = 0.01
ANSWER_SECONDS = 120


def seconds_to_first_token(folder: Path, options: EngineOptions) -> float:
    """Return the seconds from starting the server to its answer of one token.

    Raises:
        SettingsError: the server ends, or answers with an error other than not being ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    given = options.model_dump(exclude_unset=True)
    environment = {f"DAPE_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    command = [sys.executable, "-m", "dape_server", "serve", str(folder), "--port", str(port)]
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            while not _answers(port, folder.resolve().name):
                if server.poll() is not None:
                    *_, last = ["no message", *server.communicate()[1].strip().splitlines()]
                    raise SettingsError(f"dape serve ended at its start: {last}")
                time.sleep(POLL_SECONDS)
            return time.perf_counter() - started
        finally:
            server.kill()


def _answers(port: int, model: str) -> bool:
    """Ask for one token; return whether it came."""
    body = json.dumps({"model": model, "prompt": [1], "max_tokens": 1}).encode()
    request = Request(f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"})
    try:
        with urlopen(request, timeout=ANSWER_SECONDS):
            return True
    except HTTPError as error:
        if error.code == 503:
            return False
        raise SettingsError(f"dape serve answered with {error.code}: {error.read().decode()}") from error
    except URLError:
        return False
