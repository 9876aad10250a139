"""Event streams: comments while there is no news, errors in their place, nothing left when they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from dape_engine.errors import QueueFullError, StepError
from dape_server.sse import EventStream
from fakes import COMPLETIONS, FakeEngine
from live import live, until

PING = b": keep-alive\n\n"
OFTEN, NEVER = 0.001, 3600.0


class Source:
    """Events that wait for the test."""

    def __init__(self, *events: bytes | Exception):
        self.events = events
        self.gate = asyncio.Event()
        self.closed = False

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        try:
            for event in self.events:
                await self.gate.wait()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed = True


class Sink:
    """What has been sent; may open a gate after so many comments."""

    def __init__(self, source: Source, opens_after: int = 0):
        self.source = source
        self.opens_after = opens_after
        self.body = b""
        self.status: int | None = None

    async def send(self, message) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
        if self.opens_after and self.body.count(PING) >= self.opens_after:
            self.source.gate.set()


async def run(source: Source, sink: Sink, ping_interval: float) -> None:
    stream = await EventStream.open(source.__aiter__(), ping_interval)
    async with asyncio.timeout(20):
        await stream({}, None, sink.send)


async def test_silence_before_the_first_event_is_filled() -> None:
    source = Source(b"1", b"2")
    sink = Sink(source, opens_after=3)
    await run(source, sink, OFTEN)
    assert sink.status == 200
    pings, _, rest = sink.body.rpartition(PING)
    assert (pings + PING).count(PING) >= 3
    assert rest == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert source.closed


async def test_silence_between_events_is_filled() -> None:
    gate = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"1"
        await gate.wait()
        yield b"2"

    body = b""

    async def send(message) -> None:
        nonlocal body
        body += message.get("body", b"")
        if body.count(PING) >= 2:
            gate.set()

    stream = await EventStream.open(events(), OFTEN)
    async with asyncio.timeout(20):
        await stream({}, None, send)
    assert body.startswith(b"data: 1\n\n" + PING)
    assert body.endswith(PING + b"data: 2\n\ndata: [DONE]\n\n")


async def test_error_before_the_first_event_has_a_status_of_its_own() -> None:
    source = Source(QueueFullError("full", retry_after=3))
    source.gate.set()
    with pytest.raises(QueueFullError):
        await EventStream.open(source.__aiter__(), NEVER)
    assert source.closed


@pytest.mark.parametrize(
    ("error", "code"), [(StepError("lost"), b"step_failed"), (ZeroDivisionError("0xbeef"), b"internal_error")]
)
async def test_error_after_the_first_comment_is_an_event(error: Exception, code: bytes) -> None:
    source = Source(error)
    sink = Sink(source, opens_after=1)
    await run(source, sink, OFTEN)
    assert sink.status == 200
    assert code in sink.body
    assert b"0xbeef" not in sink.body
    assert sink.body.endswith(b"data: [DONE]\n\n")


async def test_no_comments_while_there_is_news() -> None:
    source = Source(b"1", b"2")
    source.gate.set()
    sink = Sink(source)
    await run(source, sink, NEVER)
    assert sink.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("ping_interval", [OFTEN, NEVER])
async def test_cancelled_before_the_first_event_closes_the_source(ping_interval: float) -> None:
    source = Source(b"1")
    task = asyncio.create_task(run(source, Sink(source), ping_interval))
    while not source.gate._waiters:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed


async def test_slow_reader_gets_no_comments_piled_up() -> None:
    """While the connection takes nothing, nothing more is written to it."""
    source = Source(b"1")
    source.gate.set()
    takes = asyncio.Event()
    sent: list[bytes] = []

    async def send(message) -> None:
        sent.append(message.get("body", b""))
        if message.get("body"):
            await takes.wait()

    stream = await EventStream.open(source.__aiter__(), OFTEN)
    task = asyncio.create_task(stream({}, None, send))
    while b"data: 1\n\n" not in sent:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(OFTEN)
    assert PING not in sent
    takes.set()
    await task


async def test_a_client_of_a_busy_engine_hears_something() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with live(engine, sse_ping_interval=0.01) as server:
        wire = await server.connect()
        await wire.post(COMPLETIONS, {"prompt": "the", "max_tokens": 2, "stream": True})
        head = await wire.reader.readuntil(PING)
        assert head.startswith(b"HTTP/1.1 200")
        assert b"data:" not in head
        await wire.reader.readuntil(PING)
        engine.gate.set()
        await wire.reader.readuntil(b"data: [DONE]\n\n")
        await server.check_serving()


async def test_a_client_that_leaves_while_it_waits_leaves_nothing() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with live(engine, sse_ping_interval=0.01) as server:
        wire = await server.connect()
        await wire.post(COMPLETIONS, {"prompt": "the", "max_tokens": 2, "stream": True})
        await wire.reader.readuntil(PING)
        wire.leave(politely=False)
        await until(lambda: engine.aborted)
        engine.gate.set()
        await server.check_serving()
