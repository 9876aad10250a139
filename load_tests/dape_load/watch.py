"""What a server says of itself during a run: free cache blocks, memory and open files."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from dape_engine.errors import SettingsError
from dape_load.target import Target
from dape_server.load.scrape import anonymous_memory, scrape

FREE_BLOCKS = "dape:kv_cache_free_blocks"
BUSY = ("dape:num_requests_running", "dape:num_requests_waiting")
OPEN_FILES = "process_open_fds"
RESIDENT = "process_resident_memory_bytes"
CALM_SECONDS = 30
POLL_SECONDS = 0.2
SETTLED = 1 / 3
"""Share of the samples, from the first on, that a slope leaves out: caches fill at first."""

Sample = tuple[float, float, float]
"""Seconds, bytes of memory, open files."""


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

    def sample() -> None:
        while not over.wait(every):
            try:
                seen = scrape(target.url, target.api_key)
            except SettingsError:
                continue  # a gap
            memory = seen[RESIDENT] if target.pid is None else anonymous_memory(target.pid)
            samples.append((time.monotonic(), memory, seen[OPEN_FILES]))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the growth of memory (MiB) and open files per hour by least squares, and how many samples tell.

    Nothing for fewer than three samples after the first third.
    """
    settled = samples[int(len(samples) * SETTLED) :]
    if len(settled) < 3:
        return {"samples": len(settled)}
    seconds, memory, files = (np.array(column, dtype=float) for column in zip(*settled, strict=True))
    hours = (seconds - seconds[0]) / 3600
    return {
        "samples": len(settled),
        "memory_mib_per_hour": float(np.polyfit(hours, memory / (1 << 20), 1)[0]),
        "open_files_per_hour": float(np.polyfit(hours, files, 1)[0]),
        "memory_mib": float(memory[-1]) / (1 << 20),
        "open_files": float(files[-1]),
    }
