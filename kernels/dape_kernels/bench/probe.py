"""What the machine itself can do, by the probes of the C++ library (kernels/csrc/probe.cpp)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_double, c_int32, c_int64, c_void_p
from functools import cache
from itertools import cycle

import torch

from dape_kernels.bench.timing import LEAST_SECONDS, Measurement, Seconds
from dape_kernels.cpu.library import instruction_set, load

INSTRUCTION_SETS = {"portable": 0, "avx2": 1, "avx512": 2}
LINE = 64  # bytes


def multiply_adds(operations: float, *, bf16: bool, threads: int) -> Measurement:
    """Return a measurement of the time that floating-point operations take at the processor's peak.

    As many threads as the kernels use run at once, each timed by its own processor time, in the instruction
    set that the kernels use.

    Args:
        operations: multiplications and additions.
        bf16: whether they are products of bfloat16 pairs (see `has_bf16`), else float32.
        threads: number of threads.
    """
    isa = INSTRUCTION_SETS[instruction_set().partition("+")[0]]

    def rate(_: int) -> float:
        found: float = _probes().dape_probe_fma(isa, bf16, LEAST_SECONDS)
        return found

    def measure() -> Seconds:
        with ThreadPoolExecutor(threads) as pool:
            mean = sum(pool.map(rate, range(threads))) / threads
        return Seconds(operations / mean, operations / mean / threads)

    return measure


def has_bf16() -> bool:
    """Return whether the instruction set in use has products of bfloat16 pairs."""
    return instruction_set().endswith("+bf16")


def reads(size: int, working_set: int, threads: int) -> Measurement:
    """Return a measurement of the time of a plain read by all threads.

    Args:
        size: bytes of one read.
        working_set: bytes that are walked through, `size` after `size`.
        threads: number of threads.
    """
    size = -(-size // LINE) * LINE
    parts = max(1, working_set // size)
    buffer = torch.ones(parts * size + LINE, dtype=torch.int8)
    start = -buffer.data_ptr() % LINE
    windows = cycle([buffer[start + part * size :] for part in range(parts)])

    def measure() -> Seconds:
        wall, count = 0.0, 0
        while wall < LEAST_SECONDS:
            rate: float = _probes().dape_probe_read(next(windows).data_ptr(), size, threads)
            wall, count = wall + size / rate, count + 1
        return Seconds(wall * threads / count, wall / count)

    return measure


@cache
def _probes() -> CDLL:
    library = load()
    library.dape_probe_fma.argtypes = (c_int32, c_int32, c_double)
    library.dape_probe_fma.restype = c_double
    library.dape_probe_read.argtypes = (c_void_p, c_int64, c_int32)
    library.dape_probe_read.restype = c_double
    return library
