"""What one request was and when its parts came, read from the answer of any OpenAI-style server.

Tokens are counted by the server (`usage`), never by chunks: a chunk may hold several of them, or none.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

REFUSALS = frozenset({429, 503})
"""Statuses of a server that is at its limits."""
DONE = b"[DONE]"
LONGEST_RETRY_SECONDS = 5.0


@dataclass(slots=True)
class Record:
    """One request. Times are readings of `time.perf_counter`, in seconds; one machine has one such clock."""

    kind: str
    sent: float
    status: int = 0
    """0: there was no answer."""
    first_byte: float | None = None
    outputs: list[float] = field(default_factory=list)
    """When each streamed output arrived."""
    ended: float = 0.0
    """When the last byte had arrived, or the client hung up."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    retry_after: str | None = None
    hung_up: bool = False
    """The client left before the end, as it meant to."""

    @property
    def refused(self) -> bool:
        """Whether the server was at its limits and said so."""
        return self.status in REFUSALS

    @property
    def succeeded(self) -> bool:
        """Whether the whole answer came."""
        return self.status == 200 and self.error is None and not self.hung_up

    @property
    def failed(self) -> bool:
        """Whether it was neither answered nor refused, nor given up by the client."""
        return not (self.succeeded or self.refused or (self.hung_up and self.error is None))

    def read_whole(self, body: bytes) -> None:
        """Take the counts, or the error, from an answer that came in one piece."""
        try:
            answer = json.loads(body)
        except ValueError:
            self.error = "the answer is not JSON"
            return
        if self.status != 200:
            self.error = f"{self.status}: {_message(answer)}"
        else:
            self._read_usage(answer)

    def read_stream(self, lines: Iterable[tuple[float, bytes]]) -> None:
        """Take outputs, counts and errors from the lines of an event stream, each with its arrival.

        A chunk is an output when it has text or is not a choice's last: a token whose character is not
        complete yet has no text.
        """
        finished = done = False
        for arrived, line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line.removeprefix(b"data:").strip()
            if payload == DONE:
                done = True
                continue
            chunk = json.loads(payload)
            if "error" in chunk:
                self.error = _message(chunk)
            for choice in chunk.get("choices", ()):
                ends = choice.get("finish_reason") is not None
                finished |= ends
                if choice.get("text") or not ends:
                    self.outputs.append(arrived)
            self._read_usage(chunk)
        if self.error is None and not self.hung_up and not (done and finished and self.output_tokens):
            self.error = "the stream ended before its end mark, finish reason and usage"

    def _read_usage(self, answer: dict[str, Any]) -> None:
        if usage := answer.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens", 0)
            self.output_tokens = usage.get("completion_tokens", 0)


def retry_seconds(record: Record) -> float:
    """Return how long a refused client waits: as long as it is told to, up to a limit, else a second.

    Up to half as long again, at random, so that those who were refused together do not return together.
    """
    told = record.retry_after or ""
    seconds = min(float(told), LONGEST_RETRY_SECONDS) if told.isdigit() else 1.0
    return seconds * random.uniform(1, 1.5)


def _message(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or "an error without a message")[:200]
