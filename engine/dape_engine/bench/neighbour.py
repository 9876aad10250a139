"""A process that keeps one core busy, as a load generator or another service on the machine does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ends by itself when the process that started it is gone.
SPIN = "import os; parent = os.getppid(); print(flush=True)\nwhile os.getppid() == parent: pass"


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Keep one core busy until the end of the block."""
    with subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
            yield
        finally:
            process.kill()
