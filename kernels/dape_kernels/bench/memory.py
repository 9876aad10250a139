"""Memory that a prefill takes beyond its inputs, its cache and its output."""

from __future__ import annotations

import multiprocessing

import torch

from dape_kernels.attention import BACKENDS
from dape_kernels.bench.workload import Shape, attention, fill
from dape_kernels.host import peak_memory, resident_memory


def prefill_extra_bytes(shape: Shape, length: int) -> int:
    """Return by how much a prefill of the backend `cpu` in float32 raises the memory of a process.

    The process is a fresh one, so that no memory that was given back hides the need.

    Args:
        shape: of the layer.
        length: tokens.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (shape, length, torch.get_num_threads()))


def _measure(shape: Shape, length: int, threads: int) -> int:
    torch.set_num_threads(threads)
    backend = BACKENDS["cpu"]
    query, key, value = shape.tensors(length)
    caches = [fill(backend, key, value, torch.float32)]
    run = attention(backend, caches, query, length, shape.encoding(dape=True))
    before = resident_memory()
    output = run()
    return max(0, peak_memory() - before - output.nbytes)
