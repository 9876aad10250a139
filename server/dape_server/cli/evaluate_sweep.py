"""The part of `dape evaluate` that scores the runs of a sweep and collects their numbers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from dape_engine.engine import AsyncEngine
from dape_engine.errors import SettingsError
from dape_server.cli.model import running_engine
from dape_server.cli.report import Work
from dape_server.cli.sweep_file import corpus_option, settings_errors
from dape_training.sweep import load_sweep, plan
from dape_training.sweep_evaluate import Protocol, evaluate_run, evaluations
from dape_training.sweep_results import collect_results

Command = TypeVar("Command", bound=Callable[..., Any])
logger = logging.getLogger(__name__)


def sweep_options(command: Command) -> Command:
    """Add the options of a sweep."""
    for option in (
        click.option(
            "--sweep",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Score the finished runs of a sweep: see `dape train --sweep`.",
        ),
        click.option(
            "--runs",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="The sweep's folder. [default: runs/<name of the sweep's file>]",
        ),
        corpus_option,
        click.option(
            "--collect",
            type=click.Path(file_okay=False, path_type=Path),
            help="Write the numbers of all runs to a folder, one JSON file for each data set.",
        ),
    ):
        command = option(command)
    return command


def evaluate_sweep(
    path: Path,
    runs: Path | None,
    corpus: Path,
    collect: Path | None,
    protocol: Protocol,
    options: dict[str, Any],
) -> None:
    """Score every finished run that has no numbers yet, then collect the numbers of all.

    Raises:
        SettingsError: the sweep is wrong, or none of its runs is finished.
    """
    with settings_errors(path):
        sweep = load_sweep(path)
        jobs = plan(sweep, runs or Path("runs") / path.stem, corpus, {})
    found = [evaluation for job in jobs if job.finished for evaluation in evaluations(job)]
    if not found:
        raise SettingsError(f"no run of {path} is finished; train them with dape train --sweep")
    left = [evaluation for evaluation in found if not evaluation.is_done(protocol)]
    finished = sum(job.finished for job in jobs)
    logger.info("%d of %d runs finished, %d models to score", finished, len(jobs), len(left))

    def start_engine(folder: Path, yarn_factor: float | None) -> AbstractAsyncContextManager[AsyncEngine]:
        return running_engine(folder, {**options, "yarn_factor": yarn_factor})

    for number, evaluation in enumerate(left, 1):
        with Work() as work:
            progress = partial(work.show, f"{evaluation.name} ({number} of {len(left)})")
            asyncio.run(evaluate_run(evaluation, protocol, start_engine, progress))
    if collect is not None:
        collect_results(sweep, jobs, path.stem, protocol, collect)
