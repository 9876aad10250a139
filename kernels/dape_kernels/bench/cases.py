"""The settings of a run and the names of what is measured in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dape_kernels.attention import BACKENDS
from dape_kernels.bench.machine import last_level_cache
from dape_kernels.bench.workload import BLOCK_SIZE, CPU, Shape

# Beyond this, walking through more memory makes no read slower.
MOST_WORKING_SET = 512 << 20


def default_working_set() -> int:
    """Return enough bytes that none of them is still in the last-level cache when its turn comes again."""
    return min(2 * last_level_cache(), MOST_WORKING_SET)


@dataclass(frozen=True, slots=True)
class Setup:
    """What to measure."""

    shape: Shape = field(default_factory=Shape)
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Tokens of a prefill."""
    keys: int = 16384
    """Cached keys of a decode step."""
    repeats: int = 7
    """Rounds, each with one sample of everything."""
    plain_limit: int = 2048
    """Longest prefill in plain PyTorch, which stores every pair and takes seconds."""
    working_set: int = field(default_factory=default_working_set)
    """Bytes of keys and values that decode steps walk through, as a model with many layers does."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is measured."""

    kernel: str
    """A backend; "plain" or "sdpa" (PyTorch without and with its own fused attention); "fma" or "read",
    the probes of the processor and the memory."""
    dtype: torch.dtype
    """Of the products in a prefill, of the cache in a decode step."""
    dape: bool | None = None
    """Whether DAPE is on; None for probes."""


def kernel_obstacle(setup: Setup, dtype: torch.dtype) -> str | None:
    """Return why the backend `cpu` cannot run with a cache of `dtype`, None if it can.

    Raises:
        ValueError: DAPE_CPU_ISA is wrong.
    """
    encoding = setup.shape.encoding(dape=True)
    return BACKENDS["cpu"].unsupported(encoding, dtype, CPU, BLOCK_SIZE)
