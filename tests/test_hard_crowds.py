"""Ten thousand connections to one process, idle or half open: others are served, and all files come back."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fakes import COMPLETIONS
from live import request
from models import write_model
from test_serve import Server

pytestmark = [pytest.mark.client, pytest.mark.slow]
CONNECTIONS = 10_000
LIMIT = 4_000
"""Above it clients are told to come back, above twice as many they are cut off."""
SPARE = 500
"""Files of the test itself."""
BODY = {"prompt": [5, 6, 7], "max_tokens": 2}
POST = request("POST", COMPLETIONS, json.dumps(BODY).encode())


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let the test, and the server as its child, open as many files as it takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < CONNECTIONS + SPARE:
        pytest.skip(f"the system lets a process open {hard} files, {CONNECTIONS + SPARE} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CONNECTIONS + SPARE), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def answer(connection: socket.socket) -> bytes:
    """Return what the server says before it closes; nothing where it has cut the connection off."""
    said = b""
    try:
        while part := connection.recv(1 << 16):
            said += part
    except ConnectionError:
        pass
    return said


@pytest.mark.usefixtures("many_files")
def test_ten_thousand_connections(tmp_path: Path) -> None:
    server = Server(
        write_model(tmp_path / "tiny"),
        *("--kv-cache-memory", "1MiB", "--max-connections", str(LIMIT)),
        *("--receive-timeout", "600", "--keep-alive-timeout", "600"),
    )
    files = Path(f"/proc/{server.process.pid}/fd")
    address = ("127.0.0.1", server.client.base_url.port)
    # The first client keeps its connection, and with it its seat.
    assert server.post(COMPLETIONS, **BODY)["usage"]["completion_tokens"] == 2
    before = len(list(files.iterdir()))
    with ExitStack() as connections:
        crowd = []
        for number in range(CONNECTIONS):
            connection = connections.enter_context(socket.create_connection(address, timeout=60))
            # Every other one is silent, the rest stop in the line, in the headers and in the body.
            connection.sendall((b"", b"", POST[:9], b"", POST[:40], b"", POST[:-5], b"")[number % 8])
            crowd.append(connection)
            if number % 1000 == 0:
                assert server.client.get("/health").status_code == 200
                assert server.post(COMPLETIONS, **BODY)["usage"]["completion_tokens"] == 2
        # Silent ones among those with a seat, those without, and those that are too many even to be refused.
        seated, standing, outside = (crowd[place] for place in (8, LIMIT + 8, CONNECTIONS - 8))
        seated.sendall(POST.replace(b"Host: test", b"Host: test\r\nConnection: close"))
        assert answer(seated).startswith(b"HTTP/1.1 200 ")
        standing.sendall(POST)
        refused = answer(standing)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: " in refused.lower()
        assert b'"overloaded"' in refused
        assert answer(outside) == b""
        assert len(list(files.iterdir())) <= before + 2 * LIMIT
        # A half-sent request goes on where it stopped.
        crowd[6].sendall(POST[-5:])
        assert crowd[6].recv(64).startswith(b"HTTP/1.1 200 ")
    server.client.get("/ready").raise_for_status()
    while len(list(files.iterdir())) > before:
        assert server.client.get("/health").status_code == 200
    assert server.metric("dape:num_requests_running") == 0
    assert server.close() == 0, "".join(server.log)
