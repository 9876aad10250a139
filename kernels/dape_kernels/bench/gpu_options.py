"""What measurements of a GPU are asked for on their command lines."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch


def gpu_options(description: str | None, arguments: list[str]) -> argparse.Namespace:
    """Return the options `json`, a path, and `dry_run`, or end with exit code 2 and what is wrong with them.

    With `dry_run` Triton's interpreter stands in for the GPU, as long as Triton has not been imported yet.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --dry-run goes the same way without one")
    return options
