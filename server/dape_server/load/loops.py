"""Closed and open loops: clients that wait for their answers, and arrivals that do not.

In a closed loop a slow server is asked less, which flatters it. An open loop sends on schedule, whatever
the answers do. Both give the same records.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dape_server.load.client import Client, Request
from dape_server.load.records import Record, retry_seconds


async def closed_loop(
    url: str, users: Sequence[Iterable[Request]], *, api_key: str | None = None, seconds: float | None = None
) -> list[Record]:
    """Let every user send its requests, each once the one before has ended; one refused waits as told.

    Args:
        url: of the server.
        users: the requests of each user, who has one connection.
        api_key: sent with every request, if any.
        seconds: after which no further request is sent; those under way are waited for.
    """
    records: list[Record] = []
    deadline = None if seconds is None else time.perf_counter() + seconds

    async def user(requests: Iterable[Request]) -> None:
        async with Client(url, api_key) as client:
            for request in requests:
                if deadline is not None and time.perf_counter() > deadline:
                    return
                record = await client.post(request)
                records.append(record)
                if record.refused:
                    await asyncio.sleep(retry_seconds(record))

    await asyncio.gather(*(user(requests) for requests in users))
    return records


async def open_loop(
    url: str, arrivals: Iterable[float], requests: Iterator[Request], *, api_key: str | None = None
) -> list[Record]:
    """Send a request at each arrival, whether or not earlier ones were answered.

    Args:
        url: of the server.
        arrivals: seconds from the start, ascending.
        requests: at least as many as arrivals.
        api_key: sent with every request, if any.
    """
    idle: list[Client] = []

    async def send(request: Request) -> Record:
        client = idle.pop() if idle else Client(url, api_key)
        record = await client.post(request)
        idle.append(client)
        return record

    started = time.perf_counter()
    under_way = []
    for arrival in arrivals:
        await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
        under_way.append(asyncio.create_task(send(next(requests))))
    records = await asyncio.gather(*under_way)
    for client in idle:
        await client.close()
    return records


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the arrivals of a Poisson process: gaps are exponential and independent.

    Args:
        rate: arrivals per second, on average.
        seconds: until when.
        seed: the same seed gives the same arrivals.
    """
    random = np.random.default_rng(seed)
    arrivals = []
    now = random.exponential(1 / rate)
    while now < seconds:
        arrivals.append(now)
        now += random.exponential(1 / rate)
    return arrivals
