"""What the scripts of benchmarks/ have in common that measure one model in an engine."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dape_engine.bench.models import model_folder
from dape_engine.weights import DEFAULT_MODEL
from dape_kernels.bench.machine import machine

Measure = Callable[[Path, argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]
"""From a model's folder and the options to figures."""


def integers(text: str) -> list[int]:
    """Return the numbers of "1,4,16"."""
    return [int(part) for part in text.split(",")]


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all such scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser


def run_script(parser: argparse.ArgumentParser, measure: Measure) -> None:
    """Measure what the command line asks for, and write the figures with the machine's name where it says."""
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        figures = asyncio.run(measure(model_folder(arguments.model, Path(scratch)), arguments))
    if arguments.json:
        result = {"machine": machine(), "model": Path(arguments.model).name, "figures": figures}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
