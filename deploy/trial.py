"""One server from its start to its end: seconds to an answer, memory, and what SIGTERM does to a request.

For processes that run `dape serve` in whatever way. Needs of Python the standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

START_SECONDS = 120
STOP_SECONDS = 60
POLL_SECONDS = 0.02
PROMPT = "It was the best of times, it was the worst of times, " * 100
TOKENS = 1500
"""Of the stream that is under way at SIGTERM: seconds of work for the shipped model."""


class TrialError(Exception):
    """What was tried does not work; the message says what and how."""


class Trial:
    """A server that is being tried.

    Args:
        process: that was started, the server itself or an ancestor of it.
        url: of the server.
        started: `time.monotonic()` when the process was started.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, started: float):
        self._process = process
        self._url = url
        self._started = started

    def first_answer(self) -> float:
        """Return the seconds from the start to an answer; the request is repeated until there is one."""
        while time.monotonic() < self._started + START_SECONDS:
            if self._process.poll() is not None:
                raise TrialError(f"the server ended with exit code {self._process.returncode}")
            try:
                with self._complete({"prompt": "It was a dark and", "max_tokens": 1}) as answer:
                    json.load(answer)
                return time.monotonic() - self._started
            except HTTPError as error:
                if error.code != 503:
                    raise TrialError(f"the server answered {error.code}: {error.read().decode()}") from error
            except (URLError, ConnectionError):
                pass
            time.sleep(POLL_SECONDS)
        raise TrialError(f"no answer in {START_SECONDS} s")

    def get(self, path: str) -> dict[str, object]:
        """Return the JSON of a route."""
        with urlopen(self._url + path, timeout=STOP_SECONDS) as answer:
            content: dict[str, object] = json.load(answer)
            return content

    def pid(self, name: str) -> int:
        """Return the process of this name among the one that was started and its descendants."""
        for pid in _family(self._process.pid):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return pid
        raise TrialError(f"there is no process {name!r}")

    def peak_rss_mib(self, pid: int) -> float:
        """Return the most memory that a process has held, in MiB."""
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        raise TrialError(f"the system does not tell the memory of process {pid}")

    def drain(self, signalled: int, server: int) -> dict[str, float]:
        """Send SIGTERM to a process in the middle of a stream, which has to end as if nothing had happened.

        Returns:
            Seconds from the signal to the exit, and peak memory of the process `server` while it streams.
        """
        body = {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        with self._complete(body | {"stream_options": {"include_usage": True}}) as stream:
            stream.readline()
            peak = self.peak_rss_mib(server)
            os.kill(signalled, signal.SIGTERM)
            told = time.monotonic()
            *_, usage, end = (line[6:].strip() for line in stream if line.startswith(b"data: "))
        if end != b"[DONE]" or json.loads(usage)["usage"]["completion_tokens"] != TOKENS:
            raise TrialError(f"after SIGTERM the stream ended with {usage.decode()} {end.decode()}")
        code = self._process.wait(STOP_SECONDS)
        if code:
            raise TrialError(f"after SIGTERM the exit code was {code}")
        return {"seconds_to_drain": time.monotonic() - told, "peak_rss_mib": peak}

    def _complete(self, body: Mapping[str, object]) -> HTTPResponse:
        headers = {"content-type": "application/json"}
        request = Request(f"{self._url}/v1/completions", json.dumps(body).encode(), headers)
        answer: HTTPResponse = urlopen(request, timeout=STOP_SECONDS)
        return answer


@contextmanager
def trial(command: Sequence[str], port: int, environment: Mapping[str, str], folder: Path) -> Iterator[Trial]:
    """Start a server that will listen on a port; end all its processes with the block."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, cwd=folder)
    try:
        yield Trial(process, f"http://127.0.0.1:{port}", started)
    finally:
        if process.poll() is None:
            for pid in reversed(_family(process.pid)):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def _family(pid: int) -> list[int]:
    """Return a process and its descendants, parents first."""
    family = [pid]
    for member in family:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            family += map(int, children.read_text().split())
    return family
