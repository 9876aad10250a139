"""The processes below another one, as Linux has them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def _parent(pid: int) -> int | None:
    """Return the parent of a living process, None for one that has ended."""
    try:
        # The name, in brackets, may hold anything.
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(parent)


def living(pids: Iterable[int]) -> set[int]:
    """Return those processes that have not ended."""
    return {pid for pid in pids if _parent(pid) is not None}


def descendants(pid: int) -> set[int]:
    """Return all processes that a process has started, directly or not."""
    everyone = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal())
    parents = {child: parent for child in everyone if (parent := _parent(child)) is not None}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def title(pid: int) -> str:
    """Return the command line of a process, empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
