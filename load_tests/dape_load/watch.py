"""What a server says of itself during a run, what the system says of its process, and what of that grows."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.request import urlopen

from dape_engine.errors import SettingsError
from dape_load.target import Target
from dape_server.load.scrape import anonymous_memory, count_threads, read_series, scrape, totals

FREE_BLOCKS = "dape:kv_cache_free_blocks"
BUSY = ("dape:num_requests_running", "dape:num_requests_waiting")
OPEN_FILES = "process_open_fds"
RESIDENT = "process_resident_memory_bytes"
CALM_SECONDS = 30
POLL_SECONDS = 0.2
MIB = 1 << 20
HEALTH_SECONDS = 60
WATCHED = ("memory_mib", "open_files", "threads", "series", "health_ms")
"""What must not grow: `series` of `/metrics`, `/health` as the time until the event loop answers it."""

Sample = dict[str, float]
"""By the names in `WATCHED`, `seconds` and `free_blocks`; without what nobody tells."""


def free_blocks(target: Target) -> int | None:
    """Return the free cache blocks once nothing runs or waits; None for servers that do not tell.

    Raises:
        SettingsError: the server was still busy after half a minute.
    """
    deadline = time.monotonic() + CALM_SECONDS
    while True:
        try:
            samples = scrape(target.url, target.api_key)
        except SettingsError:
            return None
        if FREE_BLOCKS not in samples:
            return None
        if not any(samples[name] for name in BUSY):
            return int(samples[FREE_BLOCKS])
        if time.monotonic() > deadline:
            raise SettingsError(f"{target.url} is still busy {CALM_SECONDS} s after its last request")
        time.sleep(POLL_SECONDS)


@contextmanager
def sampled(target: Target, every: float) -> Iterator[list[Sample]]:
    """Take samples in the background until the end of the block; yield the list that they go to.

    Args:
        target: the server.
        every: seconds between two samples.
    """
    samples: list[Sample] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every):
            try:
                samples.append(_sample(target))
            except (OSError, SettingsError):
                continue  # a gap

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _sample(target: Target) -> Sample:
    begun = time.monotonic()
    with urlopen(f"{target.url}/health", timeout=HEALTH_SECONDS) as answer:
        answer.read()
    health = time.monotonic() - begun
    series = read_series(target.url, target.api_key)
    seen = totals(series)
    sample = {
        "seconds": begun,
        "health_ms": 1000 * health,
        "memory_mib": seen[RESIDENT] / MIB,
        "open_files": seen[OPEN_FILES],
        "series": float(len(series)),
    }
    if FREE_BLOCKS in seen:
        sample["free_blocks"] = seen[FREE_BLOCKS]
    if target.pid is not None:
        sample["memory_mib"] = anonymous_memory(target.pid) / MIB
        sample["threads"] = float(count_threads(target.pid))
    return sample


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the last value of everything watched, and by how much it has grown, in all and per hour.

    That is the median of the last third of the samples less that of the middle third: caches fill in the
    first. Nothing for fewer than six samples.
    """
    third = len(samples) // 3
    figures: dict[str, float] = {"samples": len(samples)}
    if third < 2:
        return figures
    middle, last = samples[third : 2 * third], samples[2 * third :]
    hours = (_median(last, "seconds") - _median(middle, "seconds")) / 3600
    for name in WATCHED:
        if name in samples[0]:
            grown = _median(last, name) - _median(middle, name)
            figures |= {name: last[-1][name], f"{name}_growth": grown, f"{name}_per_hour": grown / hours}
    return {**figures, "health_ms_max": max(sample["health_ms"] for sample in samples)}


def _median(samples: Sequence[Sample], name: str) -> float:
    return statistics.median(sample[name] for sample in samples)
