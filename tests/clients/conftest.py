"""A real server with the shipped model on a loopback port, for programs that other people wrote."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_server.app import create_app
from dape_server.metrics import Metrics
from dape_server.run import make_server
from dape_server.settings import ServerSettings

OPTIONS: dict[str, Any] = {"kv_cache_memory": 64 << 20, "max_model_len": 4096, "max_num_seqs": 8}


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def url(model_folder: Path) -> Iterator[str]:
    """The address of the server, which must end when it is told to."""
    metrics = Metrics(DEFAULT_MODEL)
    engine = AsyncEngine(model_folder, EngineOptions(**OPTIONS), metrics)
    server = make_server(create_app(engine, ServerSettings(access_log=False), metrics))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """Environment of a client that must not look for anything outside this machine."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONWARNINGS": "ignore",
    }
