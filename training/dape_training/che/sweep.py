"""A sweep: workers go through the list of runs; each takes the next run that is neither finished nor taken.

A run is taken by locking a file in its folder, which the system undoes when a worker dies. So a sweep can be
killed at any time and started again, and several commands can work at one sweep.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from dape_engine.errors import DapeError
from dape_training.che.config import Run
from dape_training.che.run import perform, read_result
from dape_training.processes import SPAWNING, locked, log_from_here

logger = logging.getLogger(__name__)


def check_results(runs: Sequence[Run], out: Path) -> int:
    """Return how many of the runs are finished.

    Raises:
        ValueError: a result in the folder comes from other settings.
    """
    finished = 0
    for run in runs:
        result = read_result(out / run.folder)
        if result is None:
            continue
        if Run.model_validate(result["run"]) != run:
            raise ValueError(
                f"{out / run.folder} holds a result with other settings: choose another folder or, "
                "if only the test has changed, run `dape che evaluate`"
            )
        finished += 1
    return finished


def sweep(runs: Sequence[Run], out: Path, workers: int) -> None:
    """Perform the runs that are not finished, in order.

    Args:
        runs: what to do.
        out: the sweep's folder.
        workers: processes, which share the processor's cores.

    Raises:
        ValueError: a result in the folder comes from other settings.
        DapeError: a worker failed.
    """
    finished = check_results(runs, out)
    logger.info("%d of %d runs are finished", finished, len(runs))
    workers = min(workers, len(runs) - finished)
    if workers == 0:
        return
    threads = max(1, torch.get_num_threads() // workers)
    processes = [
        SPAWNING.Process(target=_work, args=(runs, out, threads), daemon=True) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = sum(process.exitcode != 0 for process in processes)
    if failed:
        raise DapeError(f"{failed} of {workers} workers failed, for the reasons above")


def _work(runs: Sequence[Run], out: Path, threads: int) -> None:
    """Perform runs until none is left; the body of a worker process."""
    log_from_here()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    for number, run in enumerate(runs, 1):
        perform_if_free(run, out, f"run {number} of {len(runs)}")


def perform_if_free(run: Run, out: Path, name: str) -> None:
    """Perform a run unless it is finished or another process is at it.

    Args:
        run: what to do.
        out: the sweep's folder.
        name: of the run in the log.
    """
    folder = out / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", wait=False) as taken:
        if taken and read_result(folder) is None:
            logger.info("%s starts: %s", name, run.folder)
            result = perform(run, folder)
            logger.info("%s: %s scores %.1f %%", name, run.folder, 100 * result["score"])


def _end_with_parent() -> None:
    """End this process when the one that started it has died, however it died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
