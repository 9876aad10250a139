"""Threads that compute the groups of a batch side by side on a CPU.

A tile is small: PyTorch's own threads, splitting every product of it, cost more than they bring. One
thread per group, each without threads of its own, keeps all cores at work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from dape_kernels.chunked.plan import CPU_WORKSPACE

Item = TypeVar("Item")


def count_workers(device: torch.device, workspace: int) -> int:
    """Return how many groups are computed at a time, each with its share of the workspace (bytes).

    On a CPU as many as PyTorch may use threads, if the workspace gives each what a tile can use.
    """
    if device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), workspace // CPU_WORKSPACE))


def for_each(workers: int, compute: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call `compute` with every item, `workers` of them at a time; the first exception is raised."""
    if workers == 1:
        for item in items:
            compute(item)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in _pool(workers).map(compute, items):
            pass
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    # PyTorch's number of threads is in part a property of the thread, so it is set in each.
    return ThreadPoolExecutor(workers, "dape-attention", initializer=torch.set_num_threads, initargs=(1,))
