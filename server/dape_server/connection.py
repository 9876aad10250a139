"""One client's connection, with the bounds that uvicorn lacks.

Bounded are the time to send a request, the time to take its answer, and the number of connections. What
is not HTTP is refused in the same form as everything else.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from dape_server.errors import HttpError, error_body, headers_too_large, slow_request
from dape_server.limits import LEAST_SENT_BYTES, MAX_HEADER_BYTES
from dape_server.middleware import CROWDED
from dape_server.settings import ServerSettings


class QuickConnection(h11.Connection):
    """HTTP's rules as h11 has them, and a short way for parts of chunked bodies: one goes with each token."""

    _is_chunked = False

    def send(self, event: Any) -> Any:
        """Return the bytes of an event, as h11 does."""
        if self._is_chunked and type(event) is h11.Data and event.data and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        sent = super().send(event)
        if type(event) is h11.Response:
            # h11 alone decides how a body is framed, and no value of a header holds the end of a line.
            self._is_chunked = sent is not None and b"\r\nTransfer-Encoding: chunked\r\n" in sent
        return sent


class BoundedConnection(H11Protocol):
    """Serves one connection; the application sees its requests.

    Args:
        settings: of the server.
        arguments: as uvicorn makes its protocols.
    """

    def __init__(self, *, settings: ServerSettings, **arguments: Any):
        super().__init__(**arguments)
        self.conn = QuickConnection(h11.SERVER, MAX_HEADER_BYTES)
        self._settings = settings
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; too many connections are marked or cut off."""
        super().connection_made(transport)
        # With no buffer between them, the application waits for its reader and memory is bounded.
        transport.set_write_buffer_limits(0)
        limit = self._settings.max_connections
        if len(self.connections) > 2 * limit:
            transport.abort()
        elif len(self.connections) > limit:
            self.app_state = {**self.app_state, CROWDED: True}
        self._watch_sender()

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client."""
        super().data_received(data)
        self._watch_sender()

    def pause_writing(self) -> None:
        """Note that the client has not taken all that was sent."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Note that the client has taken everything."""
        super().resume_writing()
        self._stop_timers(self._sending)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_timers(self._receiving, self._sending)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; uvicorn calls this while it handles the parser's error."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            self._refuse(headers_too_large(f"above the limit of {MAX_HEADER_BYTES} bytes"))
        else:
            self._refuse(HttpError(status, msg, code="invalid_http"))

    def _watch_sender(self) -> None:
        """Bound the time until the request is complete, as far as no application waits for it."""
        ours, theirs = self.conn.our_state, self.conn.their_state
        if theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE):
            if self._receiving is None:
                self._receiving = self.loop.call_later(self._settings.receive_timeout, self._sender_is_slow)
        else:
            self._stop_timers(self._receiving)
            self._receiving = None

    def _sender_is_slow(self) -> None:
        self._receiving = None
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            limit = self._settings.receive_timeout
            self._refuse(slow_request(f"headers: not complete after {limit:g} s"))
        self.transport.close()

    def _watch_reader(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._sending = self.loop.call_later(self._settings.send_timeout, self._check_reader, waiting)

    def _check_reader(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() > max(waiting - LEAST_SENT_BYTES, 0):
            self.transport.abort()
        else:
            self._watch_reader()

    def _refuse(self, error: HttpError) -> None:
        """Answer without the application, where an answer is still due, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = orjson.dumps(error_body(error))
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            answer = (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body))
            self.transport.writelines([self.conn.send(part) or b"" for part in (*answer, h11.EndOfMessage())])
        self.transport.close()

    @staticmethod
    def _stop_timers(*timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()
