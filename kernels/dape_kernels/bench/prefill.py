"""Times of a causal prefill of one layer: ours, what it replaces, and the processor's peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from dape_kernels.attention import BACKENDS
from dape_kernels.bench.cases import Case, Setup, kernel_obstacle
from dape_kernels.bench.probe import has_bf16, multiply_adds
from dape_kernels.bench.timing import Measurement, Seconds, interleave, timed
from dape_kernels.bench.workload import attention, fill, pairs
from dape_kernels.host import available_memory
from dape_kernels.reference import reference_attention

# Bytes that the plain form has for every pair and channel at its peak.
PLAIN_BYTES = 12


def measure_prefill(setup: Setup, length: int, progress: Callable[[int], None]) -> dict[Case, list[Seconds]]:
    """Return samples of every case at one length.

    Args:
        setup: shape and number of samples.
        length: tokens.
        progress: called with the number of rounds done.
    """
    # Neighbours run directly after each other, so the kernel stands beside what it is compared with.
    shape = setup.shape
    query, key, value = shape.tensors(length)
    q, k, v = (tensor.transpose(0, 1)[None].contiguous() for tensor in (query, key, value))
    measurements: dict[Case, Measurement] = {}

    def add(case: Case, run: Callable[[], Any]) -> None:
        measurements[case] = timed(run)

    def add_backend(name: str, dtype: torch.dtype, dape: bool) -> None:
        backend = BACKENDS[name]
        caches = [fill(backend, key, value, dtype)]
        encoding = shape.encoding(dape=dape)
        add(Case(name, dtype, dape), attention(backend, caches, query.to(dtype), length, encoding))

    if plain_fits(setup, length):
        encoding = shape.encoding(dape=True)
        add(Case("plain", torch.float32, True), lambda: reference_attention(q, k, v, encoding))
    add_backend("chunked", torch.float32, dape=True)
    add(
        Case("sdpa", torch.float32, False),
        lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    for dtype in (torch.float32, torch.bfloat16):
        if kernel_obstacle(setup, dtype) is None:
            add_backend("cpu", dtype, dape=False)
            bf16 = dtype == torch.bfloat16
            if not bf16 or has_bf16():
                operations = shape.flops(dape=True) * pairs(length)
                measurements[Case("fma", dtype)] = multiply_adds(
                    operations, bf16=bf16, threads=torch.get_num_threads()
                )
            add_backend("cpu", dtype, dape=True)
    return interleave(measurements, setup.repeats, progress)


def plain_fits(setup: Setup, length: int) -> bool:
    """Return whether plain PyTorch is measured at a length: it stores every pair."""
    needed = PLAIN_BYTES * (setup.shape.heads + setup.shape.width) * length**2
    return length <= setup.plain_limit and needed < available_memory()
