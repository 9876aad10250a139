"""Compiles the C++ attention library when the distribution is built or installed in place.

Without a compiler the installation goes on: attention then runs in plain PyTorch (the backend `chunked`).
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "kernels/dape_kernels/cpu/libdape_cpu.so"


class LibraryHook(BuildHookInterface[Any]):
    """Puts the library beside the Python that loads it, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Build the library, or say why there is none and what serves in its place."""
        library = Path(self.root, LIBRARY)
        library.unlink(missing_ok=True)  # one of another version must not stay where the build fails
        result = subprocess.run(
            [sys.executable, str(Path(self.root, "kernels/csrc/build.py")), str(library)], check=False
        )
        if result.returncode:
            self.app.display_warning(
                "Attention will run in plain PyTorch, several times slower (`dape backends`). "
                "Mend what is named above, then install again."
            )
            return
        # Loaded by ctypes, so one wheel serves every version of Python on this platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(LIBRARY)
