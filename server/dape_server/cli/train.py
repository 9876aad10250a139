"""`dape train`: train a model or a sweep of models; called again, it goes on where it stopped."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console

from dape_engine.errors import SettingsError
from dape_server.cli.sweep_file import corpus_option, settings_errors


@click.command()
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Model, data and optimiser of one run: see configs/.",
)
@click.option(
    "--sweep",
    "sweep_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Several runs in one file: see configs/experiments/.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder; a checkpoint in it is resumed. Of a sweep: the folder with one folder for each run. "
    "[default: runs/<name of the file>]",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Replace a setting of the file (of a sweep: of its base), e.g. --set steps=100; may be given several"
    " times.",
)
@corpus_option
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Runs of a sweep that are trained side by side.",
)
@click.option("--status", is_flag=True, help="Show how far the runs of a sweep are, and train nothing.")
def train(
    config: Path | None,
    sweep_file: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
    corpus: Path,
    workers: int,
    status: bool,
) -> None:
    """Train a model on JSON Lines text, with checkpoints, tensorboard events and a progress bar.

    With --sweep: train every run of a file, each in its own folder <out>/<data set>/<run>/seed-<n>, the most
    important first. Asked to end (SIGTERM or Ctrl-C), runs save a checkpoint.
    """
    path = config or sweep_file
    if path is None or (config and sweep_file):
        raise SettingsError("expected --config or --sweep, and not both")
    try:
        import dape_training.trainer  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"training needs the extra packages: pip install 'dape-serve[train]' ({error})"
        ) from error
    # A line for every file of every checkpoint would bury the losses.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    settings = dict(_parse(item) for item in overrides)
    folder = out or Path("runs") / path.stem
    with settings_errors(path):
        if config is not None:
            _train_config(config, folder, settings)
        else:
            _train_sweep(path, folder, corpus, settings, workers, status)


def _train_config(path: Path, folder: Path, settings: dict[str, Any]) -> None:
    from dape_training.config import load_training_config
    from dape_training.stopping import StopSignals
    from dape_training.trainer import train as run

    with StopSignals() as stop:
        finished = run(load_training_config(path, settings), folder, stop=stop)
    if not finished:
        _say_stopped()


def _train_sweep(
    path: Path, folder: Path, corpus: Path, settings: dict[str, Any], workers: int, status: bool
) -> None:
    from dape_server.cli.sweep_status import status_table
    from dape_training.sweep import load_sweep, plan
    from dape_training.sweep_workers import train_jobs

    sweep = load_sweep(path)
    jobs = plan(sweep, folder, corpus, settings)
    Console().print(status_table(sweep, jobs))
    if status:
        return
    failed = train_jobs(jobs, workers)
    if failed:
        raise SettingsError(
            f"{len(failed)} of {len(jobs)} runs failed, the first is {failed[0].name}: "
            f"see train.log in {failed[0].folder}"
        )
    if not all(job.finished for job in jobs):
        _say_stopped()


def _say_stopped() -> None:
    """End with an exit code that keeps scripts from going on as if all were done."""
    click.echo("dape: stopped at a checkpoint; the same command goes on from there", err=True)
    sys.exit(1)


def _parse(item: str) -> tuple[str, Any]:
    name, separator, value = item.partition("=")
    if not separator:
        raise SettingsError(f"--set {item}: expected NAME=VALUE")
    return name, yaml.safe_load(value)
