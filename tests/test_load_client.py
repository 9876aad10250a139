"""The client and the loops of load tests, against servers that misbehave as the tests like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dape_server.load.client import Client, Request, UrlError
from dape_server.load.loops import closed_loop, open_loop

STREAM = Request("stream", "/v1/completions", {"prompt": "x", "stream": True})
WHOLE = Request("score", "/v1/perplexity", {"input": "x"})


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode()


def choice(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[str]:
    """A server that treats each connection as a test likes."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    async with await asyncio.start_server(connection, "127.0.0.1", 0) as running:
        yield f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"


async def read_request(reader: asyncio.StreamReader) -> dict[str, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    body: dict[str, Any] = json.loads(await reader.readexactly(length))
    return body


def whole(body: dict[str, Any], status: str = "200 OK", *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def chunk(*events: bytes) -> bytes:
    content = b"".join(part + b"\n\n" for part in events)
    return b"%x\r\n%b\r\n" % (len(content), content)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_the_client_reads_streams_however_they_are_cut() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):  # on one connection
            assert await read_request(reader) == STREAM.body
            answer = CHUNKED + chunk(event(**choice("a")), event(**choice("b")))
            answer += chunk(event(**choice("", "length")), event(choices=[], **USAGE), b"data: [DONE]")
            for byte in answer + b"0\r\n\r\n":
                writer.write(bytes([byte]))
                await writer.drain()

    async with server(serve) as url, Client(url) as client:
        for _ in range(2):
            read = await client.post(STREAM)
            assert read.error is None
            assert (len(read.outputs), read.output_tokens, read.succeeded) == (2, 4, True)
            assert read.sent < read.outputs[0] <= read.outputs[1] <= read.ended


async def test_the_client_reports_refusals_errors_and_broken_streams() -> None:
    answers = [
        whole({"error": {"message": "full"}}, "429 Too Many Requests", "Retry-After: 3"),
        whole({"error": {"message": "max_tokens: wrong"}}, "400 Bad Request"),
        CHUNKED + chunk(event(**choice("a"))),
        whole({**USAGE}, "200 OK", "Connection: close"),
    ]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answers:
            await read_request(reader)
            answer = answers.pop(0)
            writer.write(answer)
            if answer.startswith(CHUNKED):
                return

    async with server(serve) as url, Client(url) as client:
        refused, wrong, broken = [await client.post(STREAM) for _ in range(3)]
        scored = await client.post(WHOLE)
    assert (refused.refused, refused.retry_after, refused.failed) == (True, "3", False)
    assert (wrong.failed, wrong.error) == (True, "400: max_tokens: wrong")
    assert broken.failed
    assert (scored.succeeded, scored.prompt_tokens) == (True, 3)


async def test_a_connection_closed_for_being_idle_is_opened_again() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(whole({**USAGE}))

    async with server(serve) as url, Client(url) as client:
        assert [(await client.post(WHOLE)).succeeded for _ in range(3)] == [True] * 3


async def test_a_client_without_patience_hangs_up() -> None:
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED + chunk(event(**choice("a"))))
        assert await reader.read() == b""
        left.set()

    async with server(serve) as url, Client(url) as client:
        read = await client.post(Request("stream", "/", {"stream": True}, patience=0.05))
        await asyncio.wait_for(left.wait(), 10)
    assert (read.hung_up, read.failed, read.succeeded) == (True, False, False)


async def test_a_server_that_is_not_there_is_a_failure() -> None:
    async with server(lambda *_: asyncio.sleep(0)) as url:
        pass
    async with Client(url) as client:
        read = await client.post(WHOLE)
    assert read.failed
    assert read.status == 0
    with pytest.raises(UrlError, match="ftp"):
        Client("ftp://127.0.0.1")


async def test_an_open_loop_does_not_wait_for_answers_and_a_closed_one_does() -> None:
    waiting = 0
    most = 0
    everyone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal waiting, most
        while not reader.at_eof():
            try:
                await read_request(reader)
            except asyncio.IncompleteReadError:
                return
            waiting += 1
            most = max(most, waiting)
            if waiting == 5:
                everyone.set()
            await everyone.wait()
            waiting -= 1
            writer.write(whole({**USAGE}))

    async with server(serve) as url:
        # Nothing is answered before the fifth request is there.
        records = await open_loop(url, [0.0, 0.001, 0.002, 0.003, 0.004], iter([WHOLE] * 5))
        assert [read.succeeded for read in records] == [True] * 5
        assert most == 5
        most = 0
        records = await closed_loop(url, [[WHOLE] * 4, [WHOLE] * 4])
        assert len(records) == 8
        assert most <= 2


async def test_a_closed_loop_sends_nothing_after_its_time() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(whole({**USAGE}))

    async with server(serve) as url:
        assert len(await closed_loop(url, [[WHOLE] * 3], seconds=-1.0)) == 0
