"""The short way for the parts of bodies writes what h11 writes, and refuses what h11 refuses."""

from __future__ import annotations

import h11
import pytest

from dape_server.connection import QuickConnection

PARTS = [b"data: 1\n\n", b"", b"x" * 5000]
LENGTH = str(sum(map(len, PARTS)))


def written(kind: type[h11.Connection], request: bytes, headers: list[tuple[str, str]]) -> list[bytes]:
    """Return the bytes of an answer, event by event, and of the next one on the same connection."""
    connection = kind(h11.SERVER)
    sent = []
    for body_headers in (headers, [("Content-Length", "2")]):
        connection.receive_data(request)
        while not isinstance(connection.next_event(), h11.EndOfMessage):
            pass
        sent.append(connection.send(h11.Response(status_code=200, headers=body_headers)))
        for part in PARTS if body_headers is headers else [b"ok"]:
            sent.append(connection.send(h11.Data(data=part)))
        sent.append(connection.send(h11.EndOfMessage()))
        if connection.our_state is not h11.DONE:
            break
        connection.start_next_cycle()
    return sent


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("headers", [[], [("Content-Length", LENGTH)]])
def test_bytes_are_those_of_h11(version, headers):
    request = b"GET / HTTP/" + version + b"\r\nHost: x\r\n\r\n"
    expected = written(h11.Connection, request, headers)
    assert written(QuickConnection, request, headers) == expected
    is_chunked = b"Transfer-Encoding: chunked" in expected[0]
    assert is_chunked == (version == b"1.1" and not headers)
    assert expected[1].startswith(b"9\r\n") == is_chunked


def test_parts_after_the_end_are_refused():
    connection = QuickConnection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    connection.next_event()
    connection.send(h11.Response(status_code=200, headers=[]))
    connection.send(h11.Data(data=b"1"))
    connection.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"2"))
