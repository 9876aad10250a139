"""Whether the server takes work, and how much of it is under way: starting, ready, draining."""

from __future__ import annotations

import asyncio
import contextlib
from enum import StrEnum

from dape_server.errors import UnavailableError


class Phase(StrEnum):
    """The server's life; it only moves forward."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Lifecycle:
    """Admits work while the server is ready and tells when the last of it is done."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self) -> None:
        """Take work from now on, unless the server is already told to stop."""
        if self.phase is Phase.STARTING:
            self.phase = Phase.READY

    def drain(self) -> None:
        """Take no more work."""
        self.phase = Phase.DRAINING

    def admit(self) -> None:
        """Count one request as under way; `release` must follow.

        Raises:
            UnavailableError: the server is starting or draining.
        """
        if self.phase is not Phase.READY:
            raise UnavailableError(f"the server is {self.phase} and takes no requests now")
        self._in_flight += 1
        self._idle.clear()

    def release(self) -> None:
        """Count one request as answered to its last byte."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    async def drained(self, timeout: float) -> bool:
        """Wait until no work is under way; False if the timeout (seconds) came first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        return self._idle.is_set()
