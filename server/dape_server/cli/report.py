"""Tables, plots and progress bars that the scoring commands share."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dape_engine.errors import SettingsError

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""The context lengths of the DAPE paper, doubled once more."""
logger = logging.getLogger(__name__)


def parse_lengths(text: str, option: str = "--lengths") -> list[int]:
    """Return the lengths of "128,512,2048", given by an option.

    Raises:
        SettingsError: an entry is not a whole number above 0.
    """
    try:
        lengths = sorted({int(entry) for entry in text.split(",")})
    except ValueError as error:
        raise SettingsError(f"{option} {text}: expected whole numbers with commas between them") from error
    if lengths[0] < 1:
        raise SettingsError(f"{option} {text}: {lengths[0]} is below 1")
    return lengths


def default_lengths(limit: int) -> list[int]:
    """Return 128, 256, 512, ... 16384, as far as a limit allows."""
    return [length for length in LENGTHS if length <= limit]


class Work:
    """Progress of long work on stderr: a bar on a terminal, a plain line every tenth in a log.

    Args:
        unit: what is counted, for the log.
    """

    def __init__(self, unit: str = "tokens read") -> None:
        self._unit = unit
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> Work:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, name: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of the work `name` are done."""
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total)
        self._bar.update(self._tasks[name], completed=done)
        tenth = 10 * done // total
        if self._bar.disable and tenth > self._tenths.get(name, 0):
            self._tenths[name] = tenth
            logger.info("%s: %d of %d %s", name, done, total, self._unit)


def write_json(path: Path, content: Any) -> None:
    """Write numbers for other programs.

    Raises:
        SettingsError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error


def plot_lengths(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float, float]]],
    title: str,
    references: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    xlabel: str = "context length (tokens)",
) -> None:
    """Draw perplexity over context length to a PNG.

    Args:
        path: of the file.
        curves: points of (length, perplexity, error) by name.
        title: above the picture.
        references: by the same names, points of (length, perplexity) to compare with, drawn dashed.
        xlabel: what the lengths are.

    Raises:
        SettingsError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        lengths, values, errors = zip(*points, strict=True)
        line, *_ = axes.errorbar(lengths, values, errors, marker="o", capsize=3, label=name)
        if references is not None and references[name]:
            lengths, values = zip(*references[name], strict=True)
            label = f"{name}: reference"
            axes.plot(lengths, values, "o--", color=line.get_color(), markerfacecolor="white", label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({length for points in curves.values() for length, _, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel=xlabel, ylabel="perplexity", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot write the plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
