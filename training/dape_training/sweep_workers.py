"""Training the jobs of a sweep in processes side by side, each run in a process of its own.

A run that fails does not stop the others. The parent, when asked to end, asks its workers, and these save a
checkpoint first; they do the same when they find their parent gone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from dape_training.processes import SPAWNING, locked, log_from_here
from dape_training.stopping import StopSignals
from dape_training.sweep import Job
from dape_training.trainer import prepare_data, train

LOG = "train.log"
logger = logging.getLogger(__name__)


def train_jobs(jobs: Sequence[Job], workers: int) -> list[Job]:
    """Train all jobs that are not finished, `workers` at a time, until done or asked to end.

    Args:
        jobs: in the order they are to be begun.
        workers: processes side by side.

    Returns:
        The jobs that failed; `train.log` in their folders says why.
    """
    waiting = [job for job in jobs if not job.finished]
    for job in waiting:
        job.check()
    running: dict[BaseProcess, Job] = {}
    failed: list[Job] = []
    asked = False
    with StopSignals() as stop:
        _prepare(waiting)
        while running or (waiting and not stop()):
            while waiting and len(running) < workers and not stop():
                process: BaseProcess = SPAWNING.Process(target=_train_one, args=(waiting[0], os.getpid()))
                process.start()
                running[process] = waiting.pop(0)
            connection.wait([process.sentinel for process in running], timeout=1)
            if stop() and not asked:
                asked = True
                for process in running:
                    process.terminate()
            for process in [process for process in running if not process.is_alive()]:
                job = running.pop(process)
                process.join()
                # A worker that is asked to end before it listens dies of the signal.
                if process.exitcode and not (asked and process.exitcode == -signal.SIGTERM):
                    failed.append(job)
                    logger.error("%s failed: see %s", job.name, job.folder / LOG)
                else:
                    _report(job, jobs)
    return failed


def _prepare(jobs: Sequence[Job]) -> None:
    """Make the shared tokenizer and tokens of every data set, so that workers find them."""
    for job in {job.shared: job for job in jobs}.values():
        prepare_data(job.config, job.shared)


def _report(job: Job, jobs: Sequence[Job]) -> None:
    if not job.finished:
        logger.info("%s stopped after %.0f %% of its steps", job.name, 100 * job.share_done)
        return
    done = sum(job.finished for job in jobs)
    minutes, loss = job.result["seconds"] / 60, job.result["validation_loss"]
    logger.info("%s: %.1f min, validation loss %.4f; %d of %d done", job.name, minutes, loss, done, len(jobs))


def _train_one(job: Job, parent: int) -> None:
    """Train one job in this process, whose output goes to a file in the job's folder."""
    job.begin()
    with StopSignals() as stop, (job.folder / LOG).open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        log_from_here()
        logging.getLogger("accelerate").setLevel(logging.WARNING)
        # A worker whose parent was killed may still be saving its checkpoint here.
        with locked(job.folder / ".lock", wait=True):
            if not job.finished:
                train(
                    job.config,
                    job.folder,
                    shared=job.shared,
                    stop=lambda: stop() or os.getppid() != parent,
                )
