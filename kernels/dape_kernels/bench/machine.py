"""The machine that figures belong to, as far as they depend on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from dape_kernels.attention import BACKENDS
from dape_kernels.host import lines_of

LAST_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
UNKNOWN_LAST_LEVEL = 32 << 20


def machine() -> dict[str, Any]:
    """Describe the processor and the software."""
    names = [line for line in lines_of("/proc/cpuinfo") if line.startswith("model name")]
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
