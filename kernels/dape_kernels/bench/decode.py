"""Times of a decode step of one layer, one query row against cached keys, beside a read of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch.nn import functional

from dape_kernels.attention import BACKENDS
from dape_kernels.bench.cases import Case, Setup, kernel_obstacle
from dape_kernels.bench.probe import reads
from dape_kernels.bench.timing import Measurement, Seconds, interleave, timed
from dape_kernels.bench.workload import BLOCK_SIZE, attention, fill
from dape_kernels.cpu.cache import PanelCache

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def measure_decode(setup: Setup, progress: Callable[[int], None]) -> dict[Case, list[Seconds]]:
    """Return samples of every case. Each call visits another cache, as the layers of a model do.

    Args:
        setup: shape, number of cached keys and of samples.
        progress: called with the number of rounds done.
    """
    shape = setup.shape
    query, key, value = shape.tensors(setup.keys)
    row = query[-1:]
    measurements: dict[Case, Measurement] = {}

    copies = _copies(setup, key.nbytes + value.nbytes)
    heads_first = [(key.transpose(0, 1)[None].clone(), value.transpose(0, 1)[None].clone()) for _ in copies]
    turns, row_first = cycle(heads_first), row.transpose(0, 1)[None]
    measurements[Case("sdpa", torch.float32, False)] = timed(
        lambda: functional.scaled_dot_product_attention(row_first, *next(turns))
    )
    chunked = BACKENDS["chunked"]
    caches = [fill(chunked, key, value, torch.float32) for _ in copies]
    measurements[Case("chunked", torch.float32, True)] = timed(
        attention(chunked, caches, row, setup.keys, shape.encoding(dape=True))
    )
    backend = BACKENDS["cpu"]
    for dtype in CACHE_DTYPES:
        if kernel_obstacle(setup, dtype) is not None:
            continue
        size = cache_bytes(setup, dtype)
        caches = [fill(backend, key, value, dtype) for _ in _copies(setup, size)]
        # With 16-bit weights the engine has 16-bit queries, whatever the cache.
        rows = row if dtype == torch.float32 else row.bfloat16()
        for dape in (False, True):
            run = attention(backend, caches, rows, setup.keys, shape.encoding(dape=dape))
            measurements[Case("cpu", dtype, dape)] = timed(run)
        measurements[Case("read", dtype)] = reads(size, setup.working_set, torch.get_num_threads())
    return interleave(measurements, setup.repeats, progress)


def cache_bytes(setup: Setup, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values that one decode step of the backend `cpu` reads."""
    shape, blocks = setup.shape, -(-setup.keys // BLOCK_SIZE)
    return blocks * PanelCache.block_bytes(BLOCK_SIZE, shape.heads, shape.head_dim, dtype)


def _copies(setup: Setup, size: int) -> range:
    """Return as many places as there are caches of `size` bytes in the working set."""
    return range(max(1, setup.working_set // size))
