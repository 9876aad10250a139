"""A server on a loopback socket inside the test's own event loop, and clients that write bytes by hand."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from dape_server.app import create_app
from dape_server.run import DrainingServer, make_server
from dape_server.settings import ServerSettings
from fakes import CANARY

PATIENCE = 30
"""Seconds after which a test that waits has failed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One parsed HTTP answer; a body in chunks is joined."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The envelope's content, checked for its form and for what it must not hold."""
        assert CANARY.encode() not in self.body
        assert not re.search(rb"0x[0-9a-f]{6,}", self.body)
        body = json.loads(self.body)
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        return body["error"]


class Wire:
    """A connection on which the test writes what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader = reader
        self.writer = writer

    async def send(self, *parts: bytes) -> None:
        """Write, and wait until the system has taken it."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def send_all(self, parts: Iterable[bytes]) -> None:
        """Send parts that may have no end, until the server has closed the connection."""
        for part in parts:
            await self.send(part)

    async def post(self, path: str, body: object, *headers: str) -> None:
        """Send one request with a JSON body."""
        await self.send(request("POST", path, json.dumps(body).encode(), *headers))

    async def answer(self) -> Answer:
        """Read one answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(first.split()[1]), headers, body)

    def leave(self, *, politely: bool) -> None:
        """Close the connection, or reset it."""
        if politely:
            self.writer.close()
        else:
            self.writer.transport.abort()

    async def closed(self) -> bool:
        """Wait until the server has closed the connection; False if it said something first."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True


class Live:
    """A running server and the ways to reach it."""

    def __init__(self, server: DrainingServer, engine: Any, port: int):
        self.server = server
        self.engine = engine
        self.port = port
        self._wires: list[Wire] = []

    async def connect(self, receive_buffer: int | None = None) -> Wire:
        """Open a connection, with a small buffer of the system where wanted."""
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        # The stream's own limit is what it holds for the test; small, so that unread means unread.
        wire = Wire(*await asyncio.open_connection(sock=client, limit=1 << 14))
        self._wires.append(wire)
        return wire

    async def ask(self, *parts: bytes) -> Answer:
        """Send bytes on a fresh connection and return the first answer."""
        wire = await self.connect()
        await wire.send(*parts)
        return await wire.answer()

    async def check_serving(self) -> None:
        """Check that the server works, and that nothing of earlier requests is left in the engine."""
        await until(lambda: self.engine.active == {})
        assert self.engine.free_blocks == self.engine.num_blocks
        answer = await self.ask(request("POST", "/v1/completions", b'{"prompt": "the", "max_tokens": 1}'))
        assert answer.status == 200, answer.body

    def close(self) -> None:
        """Close all connections."""
        for wire in self._wires:
            wire.writer.transport.abort()


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """Return a plain HTTP/1.1 request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that other tasks bring about."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def live(engine: Any, *, patience: float = 4 * PATIENCE, **settings: Any) -> AsyncIterator[Live]:
    """Serve an engine on a free loopback port; at the end the server must stop by itself."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        # Inherited by every connection: what is not read is to wait in the server, not in the system.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        server = make_server(create_app(engine, ServerSettings(**{"access_log": False, **settings})))
        running = Live(server, engine, listener.getsockname()[1])
        task = asyncio.create_task(server.serve(sockets=[listener]))
        async with asyncio.timeout(patience):
            await until(lambda: server.started or task.done())
            try:
                yield running
            finally:
                running.close()
                server.handle_exit(signal.SIGTERM, None)
                await task
