"""The memory of this machine and of this process, as the system tells it."""

from __future__ import annotations

from ctypes import CDLL, c_size_t
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
UNKNOWN = 1 << 62


def available_memory() -> int:
    """Return the bytes of memory that are free to use, without a limit where the system does not tell."""
    return min(_kib("/proc/meminfo", "MemAvailable") or UNKNOWN, _left_to_group())


def resident_memory() -> int:
    """Return the bytes of memory that this process has now."""
    return _kib("/proc/self/status", "VmRSS")


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had at once.

    Not `ru_maxrss`: that one begins with the size of the process that started this one.
    """
    return _kib("/proc/self/status", "VmHWM")


def release_memory() -> None:
    """Give freed memory back to the system, where the C library does so on demand (glibc).

    It keeps what lies between allocations in use, as much as was freed there.
    """
    trim = getattr(CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(c_size_t(0))


def lines_of(file: str | Path) -> list[str]:
    """Return the lines of a file, none where there is no such file."""
    path = Path(file)
    return path.read_text().splitlines() if path.exists() else []


def _left_to_group() -> int:
    """Return what the container may still take; its cached files do not count, they make room."""
    limit = next(iter(lines_of(CGROUP / "memory.max")), "max")
    if not limit.isdigit():
        return UNKNOWN
    used = (line.split() for line in lines_of(CGROUP / "memory.stat"))
    return max(0, int(limit) - sum(int(size) for name, size in used if name in ("anon", "kernel")))


def _kib(file: str, field: str) -> int:
    """Return a field in bytes of a file with lines such as "VmRSS:  1960 kB", 0 where there is none."""
    return next((int(line.split()[1]) << 10 for line in lines_of(file) if line.startswith(f"{field}:")), 0)
