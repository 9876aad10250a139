"""Checkpoints of one run: folders named by step, each whole, of which the newest is kept."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator

from dape_training.files import publish_folder, remove_folder

PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0
    """Spent on these steps, over all processes that worked on the run one after the other."""


def last_progress(run: Path) -> Progress:
    """Return how far the newest checkpoint of a run folder is."""
    while (newest := _newest(run)) is not None:
        # A checkpoint that vanishes while we look has given way to a newer one.
        with suppress(FileNotFoundError):
            return Progress(**json.loads((newest / PROGRESS).read_text()))
    return Progress()


def resume(accelerator: Accelerator, run: Path) -> Progress:
    """Load the newest checkpoint, if there is one, into what `accelerator` has prepared."""
    newest = _newest(run)
    if newest is not None:
        accelerator.load_state(str(newest))
    return last_progress(run)


def save(accelerator: Accelerator, run: Path, progress: Progress) -> None:
    """Save a checkpoint; the one before it goes when the new one is complete.

    Every process of the run calls this.
    """
    new = run / "checkpoints" / "new"
    if accelerator.is_main_process:
        remove_folder(new)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new), safe_serialization=True)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (new / PROGRESS).write_text(json.dumps(asdict(progress)))
    older = _all(run)
    path = run / "checkpoints" / f"step-{progress.step}"
    if path not in older:
        publish_folder(new, path)
        for folder in older:
            remove_folder(folder)


def _newest(run: Path) -> Path | None:
    return max(_all(run), key=lambda path: int(path.name.partition("-")[2]), default=None)


def _all(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob("step-*"))
