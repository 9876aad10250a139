"""Locust users that send this project's workload and keep a record of every request.

Imported by the files of `scenarios/` inside locust's own process, never by anything else: locust replaces
the standard library's sockets. The figures come from the records; locust's rows TTFT, TPOT and E2E show them
live, while its POST rows only time the headers of an answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
import requests
from locust import HttpUser, events, task
from locust.env import Environment

from dape_load.target import find_target
from dape_load.workload import PERPLEXITY, Sizes, Workload
from dape_server.load.client import Request
from dape_server.load.figures import e2e, tpot, ttft
from dape_server.load.records import Record, retry_seconds

RECORDS: list[Record] = []
WORKLOADS: dict[str, Workload] = {}
DEFAULT = Sizes()
TIMEOUT_SECONDS = 600


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    for name in Sizes.__slots__:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(DEFAULT, name), help="see Sizes in workload.py")
    parser.add_argument("--model", default="", help="by default the first that the server names")
    parser.add_argument("--api-key", default=None, env_var="LOAD_API_KEY", help="sent as a bearer token")
    parser.add_argument("--score-route", default=PERPLEXITY, help="route that texts are scored by")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and choices")
    parser.add_argument("--records", default="", help="JSON file for one record per request")
    parser.add_argument("--spike-after", type=float, default=20.0, help="seconds before the spike")
    parser.add_argument("--spike-seconds", type=float, default=10.0, help="how long the spike lasts")


@events.test_start.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    target = find_target(
        environment.host or "", options.model or None, options.api_key or None, options.score_route
    )
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__slots__})
    WORKLOADS["all"] = target.workload(sizes, options.seed)


@events.quitting.add_listener
def _write(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    if options.records:
        Path(options.records).write_text(json.dumps([asdict(record) for record in RECORDS]))


class MeasuredUser(HttpUser):
    """Sends requests of a mixture one after another; after a refusal it waits as long as it is told to."""

    abstract = True
    kinds: Mapping[str, int] = {}

    def on_start(self) -> None:
        """Take the key along with every request."""
        options: Any = self.environment.parsed_options
        if options.api_key:
            self.client.headers["Authorization"] = f"Bearer {options.api_key}"

    @task
    def next_request(self) -> None:
        """Send the next request of the mixture."""
        self.send(self.next())

    def next(self) -> Request:
        """Return what is sent next."""
        return WORKLOADS["all"].draw(self.kinds)

    def send(self, request: Request) -> None:
        """Send a request, keep its record and tell locust of it."""
        record = Record(request.kind, time.perf_counter(), hung_up=True)
        lines: list[tuple[float, bytes]] = []
        body: bytes | None = None
        with gevent.Timeout(request.patience, False):
            body = self._exchange(request, record, lines)
            record.hung_up = False
        record.ended = time.perf_counter()
        if lines:
            record.read_stream(lines)
        elif body is not None and record.error is None:
            record.read_whole(body)
        RECORDS.append(record)
        self._report(record)
        if record.refused:
            gevent.sleep(retry_seconds(record))

    def _exchange(self, request: Request, record: Record, lines: list[tuple[float, bytes]]) -> bytes | None:
        """Fill in the lines of a stream as they come, or return the body of another answer."""
        try:
            with self.client.post(
                request.path,
                json=request.body,
                name=request.kind,
                stream=True,
                catch_response=True,
                timeout=TIMEOUT_SECONDS,
            ) as response:
                try:
                    record.status = response.status_code
                    record.retry_after = response.headers.get("retry-after")
                    response.success()  # the record decides
                    if response.error is not None:
                        record.error = f"{type(response.error).__name__}: {response.error}"
                    elif record.status == 200 and request.body.get("stream"):
                        for line in response.iter_lines():
                            lines.append((time.perf_counter(), line))
                    else:
                        return bytes(response.content)
                finally:
                    response.close()
        except requests.RequestException as error:
            record.error = f"{type(error).__name__}: {error}"
        return None

    def _report(self, record: Record) -> None:
        trouble = RuntimeError(record.error) if record.failed else None
        rows = {"TTFT": ttft(record), "TPOT": tpot(record), "E2E": e2e(record)}
        for row, milliseconds in rows.items():
            if milliseconds is not None and (trouble is None or row == "E2E"):
                self.environment.events.request.fire(
                    request_type=row,
                    name=record.kind,
                    response_time=milliseconds,
                    response_length=record.output_tokens,
                    exception=trouble,
                    context={},
                )
