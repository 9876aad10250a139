"""A lean HTTP client for measuring: one connection, raw bytes with their arrival, JSON only afterwards.

Ordinary clients spend more time on a streamed token than a fast server does, and on a machine of few cores
take that time from it. This one reads chunks from the socket, notes when they came, and parses them once
the answer is complete.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dape_server.load.records import Record

LONGEST_LINE = 1 << 20
HTTP = b"HTTP/1."


class UrlError(ValueError):
    """The address is not one of a plain HTTP server."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends."""

    kind: str
    """Name of its records."""
    path: str
    body: dict[str, Any]
    """Sent as JSON; with `stream` the answer is read as an event stream."""
    patience: float | None = None
    """Seconds after which the client hangs up."""


class Client:
    """One keep-alive connection to a server, for one request at a time; used as a context manager.

    Args:
        url: of the server, `http://host:port` without a path.
        api_key: sent with every request, if any.

    Raises:
        UrlError: the address is of another kind.
    """

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise UrlError(f"{url}: expected http://host:port")
        self._address = (parts.hostname, parts.port or 80)
        self._key = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def post(self, request: Request) -> Record:
        """Send a request and return its record; troubles of the network are its error."""
        content = json.dumps(request.body).encode()
        head = (
            f"POST {request.path} HTTP/1.1\r\nHost: {self._address[0]}:{self._address[1]}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        record = Record(request.kind, time.perf_counter())
        pieces: list[tuple[float, bytes]] = []
        try:
            async with asyncio.timeout(request.patience):
                async with aclosing(self._exchange(head.encode() + content, record)) as parts:
                    async for part in parts:
                        pieces.append((time.perf_counter(), part))
        except TimeoutError:
            record.hung_up = True
            await self.close()
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}"
            await self.close()
        record.ended = time.perf_counter()
        if pieces and record.status == 200 and request.body.get("stream"):
            record.read_stream(lines(pieces))
        elif record.status and not record.hung_up and record.error is None:
            record.read_whole(b"".join(piece for _, piece in pieces))
        return record

    async def _exchange(self, message: bytes, record: Record) -> AsyncGenerator[bytes, None]:
        """Send a message and yield the parts of the answer's body as they come."""
        reused = self._streams is not None
        reader, status = await self._send(message)
        if not status and reused:
            # The server has closed the connection for being idle.
            await self.close()
            reader, status = await self._send(message)
        record.first_byte = time.perf_counter()
        if not status.startswith(HTTP):
            raise ConnectionError("the server has closed the connection")
        record.status = int(status.split()[1])
        headers = await _headers(reader)
        record.retry_after = headers.get("retry-after")
        if headers.get("transfer-encoding") == "chunked":
            while size := int((await reader.readline()).split(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await _headers(reader)  # what may follow the last chunk
        elif "content-length" in headers:
            yield await reader.readexactly(int(headers["content-length"]))
        else:
            while part := await reader.read(LONGEST_LINE):
                yield part
            headers["connection"] = "close"
        if headers.get("connection", "").lower() == "close":
            await self.close()

    async def _send(self, message: bytes) -> tuple[asyncio.StreamReader, bytes]:
        """Send a message and return what the answer is read from and its first line, empty without answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, limit=LONGEST_LINE)
        reader, writer = self._streams
        try:
            writer.write(message)
            await writer.drain()
            return reader, await reader.readline()
        except ConnectionResetError:
            return reader, b""


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def lines(pieces: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """Return the lines of a body with the arrival of their last byte, however it was cut into pieces."""
    found = []
    rest = b""
    for arrived, piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        found += [(arrived, line) for line in whole]
    return found
