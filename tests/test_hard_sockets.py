"""HTTP as bytes: broken, endless, slow, too much, or in halves. The server answers, closes and goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from itertools import repeat

import pytest

from dape_server.limits import MAX_HEADER_BYTES, MAX_HEADERS
from fakes import CANARY, COMPLETIONS, FakeEngine
from live import PATIENCE, live, request, until

SOON = 0.1
"""Seconds that a client is given in tests of those that take longer."""
BODY = json.dumps({"prompt": CANARY, "max_tokens": 2}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="TLS"),
        pytest.param(b"HELO swordfish\r\n\r\n", 400, id="another protocol"),
        pytest.param(b"GET /health HTTP/11\r\nHost: a\r\n\r\n", 400, id="unknown version"),
        pytest.param(b"GET /health HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, id="two hosts"),
        pytest.param(b"GET /hea\x00lth HTTP/1.1\r\nHost: a\r\n\r\n", 400, id="NUL in the path"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\rb\r\n\r\n", 400, id="bare CR"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: a\r\nX y: z\r\n\r\n", 400, id="space in a name"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", 400, id="header without value"),
        pytest.param(POST + b"Content-Length: -5\r\n\r\n", 400, id="negative length"),
        pytest.param(POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", 400, id="two lengths"),
        pytest.param(POST + b"Content-Length: five\r\n\r\nabcde", 400, id="length in words"),
        pytest.param(POST + b"Transfer-Encoding: gzip\r\n\r\nabc", 501, id="unknown transfer encoding"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, id="chunk size in words"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabcde", 400, id="negative chunk"),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n", 400, id="endless chunk"
        ),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n", 400, id="chunk longer than said"
        ),
    ],
)
async def test_what_is_not_http_is_refused_in_our_form(raw, status):
    async with live(FakeEngine()) as server:
        wire = await server.connect()
        await wire.send(raw)
        answer = await wire.answer()
        assert answer.status == status
        assert answer.error["code"] == "invalid_http"
        assert answer.headers["connection"] == "close"
        assert await wire.closed()
        assert server.engine.requests == []
        await server.check_serving()


async def test_length_and_chunks_together_cannot_hide_a_second_request():
    """What one parser takes for a body, another could take for the next request."""
    hidden = request("GET", "/version")
    smuggled = POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden
    async with live(FakeEngine()) as server:
        wire = await server.connect()
        await wire.send(smuggled)
        answer = await wire.answer()
        assert answer.status == 400
        assert answer.error["code"] == "invalid_http"
        assert answer.headers["connection"] == "close"
        assert await wire.closed()


# --- Too much ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([f"X-{i}: a" for i in range(MAX_HEADERS)], id="many"),
        pytest.param(["Authorization: " + "x" * MAX_HEADER_BYTES], id="long"),
        pytest.param([f"X-{i}: " + "x" * 1000 for i in range(20)], id="long together"),
        pytest.param(["X-" + "x" * MAX_HEADER_BYTES + ": a"], id="long name"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_too_large_headers_are_refused(headers, at_once):
    raw = request("GET", "/health", b"", *headers)
    parts = [raw] if at_once else [raw[i : i + 4096] for i in range(0, len(raw), 4096)]
    async with live(FakeEngine()) as server:
        answer = await server.ask(*parts)
        assert answer.status == 431
        assert answer.error["code"] == "headers_too_large"
        assert str(MAX_HEADERS) in answer.error["message"] or str(MAX_HEADER_BYTES) in answer.error["message"]
        await server.check_serving()


async def test_headers_at_the_limit_are_served():
    headers = [f"X-{i}: a" for i in range(MAX_HEADERS - 2)]
    async with live(FakeEngine()) as server:
        answer = await server.ask(request("GET", "/health", b"", *headers, "X-Long: " + "x" * 8000))
        assert answer.status == 200


async def test_long_paths_are_refused():
    async with live(FakeEngine()) as server:
        answer = await server.ask(request("GET", "/v1/models/" + "x" * MAX_HEADER_BYTES))
        assert answer.status == 431
        answer = await server.ask(request("GET", "/v1/models/" + "x" * 8000))
        assert answer.status == 404
        assert len(answer.error["message"]) < 200


async def test_endless_headers_are_cut_off():
    async with live(FakeEngine()) as server:
        wire = await server.connect()
        await wire.send(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            await wire.send_all(repeat(b"X-More: " + b"x" * 1000 + b"\r\n"))
        await server.check_serving()


async def test_a_client_that_still_sends_a_refused_body_sees_the_answer():
    """A server that closed at once would reset the connection and its own answer with it."""
    size = 12 << 20
    async with live(FakeEngine(), max_body_size=1 << 20) as server:
        wire = await server.connect()
        await wire.send(POST + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            await wire.send(b" " * (1 << 16))
        answer = await wire.answer()
        assert answer.status == 413
        assert answer.error["code"] == "body_too_large"
        await server.check_serving()


async def test_an_endless_body_is_refused_and_cut_off():
    async with live(FakeEngine(), max_body_size=1024, receive_timeout=PATIENCE) as server:
        wire = await server.connect()
        await wire.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(ConnectionError):
            await wire.send_all(repeat(b"100000\r\n" + b" " * (1 << 20) + b"\r\n"))
        await server.check_serving()


async def test_bodies_are_bounded_in_all():
    engine = FakeEngine()
    async with live(engine, max_total_body_size=2048) as server:
        engine.gate.clear()
        body = BODY.ljust(900)
        first, second, third = [await server.connect() for _ in range(3)]
        for wire in (first, second):
            await wire.send(request("POST", COMPLETIONS, body))
        await until(lambda: len(engine.active) == 2)
        await third.send(request("POST", COMPLETIONS, body))
        refused = await third.answer()
        assert refused.status == 503
        assert refused.error["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) > 0
        engine.gate.set()
        for wire in (first, second):
            assert (await wire.answer()).status == 200
        for _ in range(5):
            answer = await server.ask(request("POST", COMPLETIONS, body))
            assert answer.status == 200
        await server.check_serving()


# --- Too slow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"G", b"GET /health HTTP/1.1\r\nHost: te", b"GET / HTTP/1.1\r\nA: b\r\n"])
async def test_slow_headers_are_refused(begun):
    async with live(FakeEngine(), receive_timeout=SOON) as server:
        wire = await server.connect()
        await wire.send(begun)
        answer = await wire.answer()
        assert answer.status == 408
        assert answer.error["code"] == "request_timeout"
        assert await wire.closed()
        await server.check_serving()


async def test_a_trickle_of_headers_gains_no_time():
    async with live(FakeEngine(), receive_timeout=SOON) as server:
        wire = await server.connect()
        await wire.send(b"GET /health HTTP/1.1\r\nX-Slow: ")
        answer = asyncio.ensure_future(wire.answer())
        while not answer.done():
            await wire.send(b"x")
            await asyncio.wait({answer}, timeout=SOON / 10)
        assert answer.result().status == 408


@pytest.mark.parametrize("after", ["nothing", "one request"])
async def test_a_silent_connection_is_closed(after):
    async with live(FakeEngine(), receive_timeout=SOON, keep_alive_timeout=SOON) as server:
        wire = await server.connect()
        if after != "nothing":
            await wire.send(request("GET", "/health"))
            assert (await wire.answer()).status == 200
        assert await wire.closed()


async def test_a_connection_is_kept_for_the_next_request():
    async with live(FakeEngine(), receive_timeout=SOON) as server:
        wire = await server.connect()
        for _ in range(3):
            await wire.send(request("POST", COMPLETIONS, BODY))
            assert (await wire.answer()).status == 200
            # Longer than the time for headers, which does not run between requests.
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(wire.closed(), 2 * SOON)


@pytest.mark.parametrize("trickle", [False, True])
async def test_a_slow_body_is_refused(trickle):
    async with live(FakeEngine(), receive_timeout=SOON) as server:
        wire = await server.connect()
        await wire.send(POST + b"Content-Length: 1000\r\n\r\n{")
        answer = asyncio.ensure_future(wire.answer())
        while trickle and not answer.done():
            await wire.send(b" ")
            await asyncio.wait({answer}, timeout=SOON / 10)
        assert (await answer).status == 408
        assert answer.result().error["code"] == "request_timeout"
        assert answer.result().headers["x-request-id"]
        assert server.engine.requests == []
        await server.check_serving()


async def test_a_body_that_comes_after_its_refusal_is_bounded_in_time():
    async with live(FakeEngine(), receive_timeout=SOON, api_key=("key",)) as server:
        wire = await server.connect()
        await wire.send(POST + b"Content-Length: 1000\r\n\r\n")
        assert (await wire.answer()).status == 401
        closed = asyncio.ensure_future(wire.closed())
        while not closed.done():
            wire.writer.write(b" ")
            await asyncio.wait({closed}, timeout=SOON / 10)


async def test_a_body_shorter_than_said_is_no_request():
    async with live(FakeEngine()) as server:
        wire = await server.connect()
        await wire.send(POST + b"Content-Length: 1000\r\n\r\n" + BODY)
        wire.writer.close()
        await server.check_serving()
        assert len(server.engine.requests) == 1


# --- Readers -------------------------------------------------------------------------------------

LONG = {"prompt": "the", "max_tokens": 4_000, "logprobs": 5}


async def until_waiting(server):
    """Wait until the server has more to send than the system takes."""
    connections = server.server.server_state.connections
    await until(lambda: any(one.flow.write_paused for one in connections))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_does_not_read_is_cut_off(stream):
    """Until then what waits for it is bounded: the connection itself holds no more than one event."""
    engine = FakeEngine(max_model_len=5_000, num_blocks=10_000)
    async with live(engine, send_timeout=SOON) as server:
        wire = await server.connect(receive_buffer=4096)
        await wire.post(COMPLETIONS, {**LONG, "stream": stream})
        await until_waiting(server)
        [connection] = [one for one in server.server.server_state.connections if one.flow.write_paused]
        if stream:
            assert connection.transport.get_write_buffer_size() < 1 << 16
        await until(lambda: connection.transport.is_closing())
        await server.check_serving()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_slow_but_steady_reader_is_served_to_the_end(stream):
    engine = FakeEngine(max_model_len=5_000, num_blocks=10_000)
    async with live(engine, send_timeout=1.0) as server:
        wire = await server.connect(receive_buffer=1 << 16)
        await wire.post(COMPLETIONS, {**LONG, "stream": stream}, "Connection: close")
        await until_waiting(server)
        read = b""
        while part := await wire.reader.read(1 << 18):
            read += part
        assert b"[DONE]" in read if stream else read.endswith(b"}")
        await server.check_serving()


async def test_a_half_closed_client_has_left():
    """A client that shuts its sending side is taken to have gone: few mean anything else by it."""
    engine = FakeEngine()
    async with live(engine) as server:
        engine.gate.clear()
        wire = await server.connect()
        await wire.send(request("POST", COMPLETIONS, BODY))
        await until(lambda: engine.active)
        wire.writer.write_eof()
        await until(lambda: not engine.active)
        assert len(engine.aborted) == 1
        engine.gate.set()
        await server.check_serving()


# --- Several on one connection -------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order():
    async with live(FakeEngine()) as server:
        wire = await server.connect()
        await wire.send(
            request("POST", COMPLETIONS, BODY, "X-Request-Id: first")
            + request("POST", COMPLETIONS, b'{"prompt": 5}', "X-Request-Id: second")
            + request("GET", "/version", b"", "X-Request-Id: third")
            + b"garbage\r\n\r\n"
        )
        answers = [await wire.answer() for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 400, 200, 400]
        assert [answer.headers.get("x-request-id") for answer in answers] == [
            "first",
            "second",
            "third",
            None,
        ]
        assert await wire.closed()


async def test_pipelined_requests_of_a_client_that_leaves_are_dropped():
    engine = FakeEngine()
    async with live(engine) as server:
        engine.gate.clear()
        wire = await server.connect()
        await wire.send(request("POST", COMPLETIONS, BODY) * 5)
        await until(lambda: engine.active)
        wire.writer.transport.abort()
        await until(lambda: not engine.active)
        engine.gate.set()
        await server.check_serving()
        assert len(engine.requests) == 2


# --- Crowds --------------------------------------------------------------------------------------


async def test_too_many_connections():
    engine = FakeEngine()
    async with live(engine, max_connections=4) as server:
        seated = [await server.connect() for _ in range(4)]
        for wire in seated:
            await wire.send(request("GET", "/health"))
            assert (await wire.answer()).status == 200
        crowd = [await server.connect() for _ in range(4)]
        for wire in crowd:
            await wire.send(request("GET", "/health") + request("POST", COMPLETIONS, BODY))
            assert (await wire.answer()).status == 200
            refused = await wire.answer()
            assert refused.status == 503
            assert refused.error["code"] == "overloaded"
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["connection"] == "close"
        assert engine.requests == []
        # Those who were first are served all the while.
        await seated[0].send(request("POST", COMPLETIONS, BODY))
        assert (await seated[0].answer()).status == 200
        server.close()
        await until(lambda: not server.server.server_state.connections)
        await server.check_serving()


async def test_far_too_many_connections_are_cut_off():
    async with live(FakeEngine(), max_connections=4) as server:
        wires = [await server.connect() for _ in range(12)]
        cut = [asyncio.ensure_future(wire.closed()) for wire in wires]
        await until(lambda: sum(task.done() for task in cut) == 4)
        assert len(server.server.server_state.connections) == 8
        server.close()
        await asyncio.gather(*cut)


# --- Logs ----------------------------------------------------------------------------------------


async def test_logs_hold_no_key_no_prompt_and_no_line_of_a_client(caplog):
    caplog.set_level(logging.DEBUG)
    engine = FakeEngine()
    async with live(engine, access_log=True, api_key=("secret-key",)) as server:
        for key in ("secret-key", "wrong-key"):
            header = f"Authorization: Bearer {key}"
            await server.ask(request("POST", COMPLETIONS, BODY, header))
            await server.ask(request("GET", "/x%0a%0dINJECTED?a=%0aINJECTED", b"", header))
            await server.ask(request("POST", COMPLETIONS, BODY, header, "X-Request-Id: a b;INJECTED"))
            await server.ask(request("POST", COMPLETIONS, b'{"prompt": "swordfish', header))
            await server.ask(f"GET /health HTTP/1.1\r\n{header}\r\nbad\r\n\r\n".encode())
        engine.fails_with = RuntimeError("a defect")
        answer = await server.ask(request("POST", COMPLETIONS, BODY, "Authorization: Bearer secret-key"))
        assert answer.status == 500
        assert "defect" not in answer.error["message"]
    written = [record.getMessage() for record in caplog.records]
    assert any("/v1/completions" in line for line in written)
    assert "a defect" in caplog.text
    for line in written:
        assert "-key" not in line
        assert CANARY not in line
        assert not re.search(r"[\r\n]", line)
    assert "secret-key" not in caplog.text
    assert CANARY not in caplog.text


async def test_one_loop_serves_many_kinds_of_bad_clients_and_a_good_one():
    engine = FakeEngine(max_model_len=5_000, num_blocks=10_000)
    async with live(engine, receive_timeout=SOON, send_timeout=SOON) as server:
        bad = [await server.connect(receive_buffer=4096) for _ in range(40)]
        for number, wire in enumerate(bad):
            if number % 4 == 0:
                await wire.send(b"GET /hea")
            elif number % 4 == 1:
                await wire.send(POST + b"Content-Length: 100\r\n\r\n{")
            elif number % 4 == 2:
                await wire.post(COMPLETIONS, {**LONG, "max_tokens": 2000, "stream": True})
            else:
                await wire.send(b"\x00" * 100)
        for _ in range(20):
            answer = await server.ask(request("POST", COMPLETIONS, BODY))
            assert answer.status == 200
        await until(lambda: not engine.active)
        server.close()
        await server.check_serving()
