"""What lies where in the folder of a run, and how far the run is; needs none of the training packages."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

METRICS = "metrics.jsonl"
RESULT = "result.json"
"""Exists when the run is finished."""
PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0
    """Spent on these steps, over all processes that worked on the run one after the other."""


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of the run's checkpoints, the newest last."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]))


def last_progress(run: Path) -> Progress:
    """Return how far the newest checkpoint of a run folder is."""
    while folders := checkpoints(run):
        # A checkpoint that vanishes while we look has given way to a newer one.
        with suppress(FileNotFoundError):
            return Progress(**json.loads((folders[-1] / PROGRESS).read_text()))
    return Progress()
