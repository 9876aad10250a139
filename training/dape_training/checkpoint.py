"""Checkpoints of one run: folders named by step, each whole, of which the newest is kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from dape_training.files import publish_folder, remove_folder
from dape_training.run_folder import PROGRESS, Progress, checkpoints, last_progress


def resume(accelerator: Accelerator, run: Path) -> Progress:
    """Load the newest checkpoint, if there is one, into what `accelerator` has prepared."""
    folders = checkpoints(run)
    if folders:
        accelerator.load_state(str(folders[-1]))
    return last_progress(run)


def save(accelerator: Accelerator, run: Path, progress: Progress) -> None:
    """Save a checkpoint; those before it go when it is complete. Every process of the run calls this."""
    new = run / "checkpoints" / "new"
    if accelerator.is_main_process:
        remove_folder(new)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new), safe_serialization=True)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (new / PROGRESS).write_text(json.dumps(asdict(progress)))
    older = checkpoints(run)
    publish_folder(new, run / "checkpoints" / f"step-{progress.step}")
    for folder in older:
        remove_folder(folder)
