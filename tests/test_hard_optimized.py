"""The checks of optimized_check.py in a Python without asserts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("optimized_check.py")


def python(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the script with the import paths of this process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *options, str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_everything_holds_without_asserts() -> None:
    result = python("-O")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all checks hold" in result.stdout
