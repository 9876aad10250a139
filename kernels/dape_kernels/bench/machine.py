"""The machine that figures belong to, as far as they depend on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from dape_kernels.attention import BACKENDS

LAST_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
UNKNOWN_LAST_LEVEL = 32 << 20


def machine() -> dict[str, Any]:
    """Describe the processor and the software."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_mib": last_level_cache() >> 20,
        "kernels": BACKENDS["cpu"].describe(),
        "torch": torch.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }


def last_level_cache() -> int:
    """Return the bytes of the last-level cache; a guess where the system does not tell."""
    if not LAST_LEVEL.exists():
        return UNKNOWN_LAST_LEVEL
    return int(LAST_LEVEL.read_text().strip().removesuffix("K")) << 10


def available_memory() -> int:
    """Return the bytes of memory that are free to use, without a limit where the system does not tell."""
    return _kib("/proc/meminfo", "MemAvailable") or 1 << 62


def resident_memory() -> int:
    """Return the bytes of memory that this process has now."""
    return _kib("/proc/self/status", "VmRSS")


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had at once.

    Not `ru_maxrss`: that one begins with the size of the process that started this one.
    """
    return _kib("/proc/self/status", "VmHWM")


def _kib(file: str, field: str) -> int:
    """Return a field in bytes of a file with lines such as "VmRSS:  1960 kB", 0 where there is none."""
    return next((int(line.split()[1]) << 10 for line in _lines(file) if line.startswith(f"{field}:")), 0)


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text().splitlines() if path.exists() else []
