"""`dape che`: train, test and report models on the CHE tasks (length generalisation on formal languages)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Any

import click

from dape_engine.errors import SettingsError
from dape_server.cli.report import write_json
from dape_server.cli.sweep_file import settings_errors
from dape_training.che.config import CheConfig, load_che_config
from dape_training.che.report import collect, markdown
from dape_training.che.run import accuracy_by_length, load_trained, read_result, write_result
from dape_training.che.sweep import check_results, sweep

logger = logging.getLogger(__name__)


@click.group()
def che() -> None:
    """Train and test models on the 15 tasks of the Chomsky hierarchy."""


def sweep_options(command: Callable[..., None]) -> click.Command:
    """Add the options that say which sweep, and call the command with it as `config`."""

    def run(config: Path, out: Path | None, **options: Any) -> None:
        chosen = {name: options.pop(name) for name in ("tasks", "encodings", "seeds", "setups")}
        training = {name: options.pop(name) for name in ("steps", "batch_size")}
        with settings_errors(config):
            settings = load_che_config(config, _given(chosen), _given(training))
            command(settings, out or Path("runs") / config.stem, **options)

    decorated: Callable[..., None] = update_wrapper(run, command)
    for option in (
        click.option("--batch-size", type=click.IntRange(1), help="Strings per step, instead of the file's."),
        click.option("--steps", type=click.IntRange(1), help="Training steps, instead of the file's."),
        click.option(
            "--setup", "setups", multiple=True, help="bidirectional, causal; instead of the file's."
        ),
        click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), help="Instead of the file's."),
        click.option("--encoding", "encodings", multiple=True, help="Only these of the file's encodings."),
        click.option("--task", "tasks", multiple=True, help="Instead of the file's tasks."),
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder of the runs. [default: runs/<name of the config>]",
        ),
        click.option(
            "--config",
            required=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Tasks, encodings, seeds and budget: see configs/experiments/che.yaml.",
        ),
    ):
        decorated = option(decorated)
    return che.command()(decorated)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, ())}


@sweep_options
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one per core",
    help="Runs trained at the same time.",
)
def train(config: CheConfig, out: Path, workers: int) -> None:
    """Train and test what is not finished; may be killed and called again at any time."""
    sweep(config.runs(), out, workers)


@sweep_options
def evaluate(config: CheConfig, out: Path) -> None:
    """Test finished models again, at the lengths and with the samples that the file has now."""
    for run in config.runs():
        result = read_result(out / run.folder)
        if result is not None:
            model = load_trained(run, out / run.folder)
            new = write_result(run, out / run.folder, result["training"], accuracy_by_length(model, run))
            logger.info("%s scores %.1f %%", run.folder, 100 * new["score"])


@sweep_options
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option("--markdown", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables.")
def report(config: CheConfig, out: Path, json_path: Path | None, page: Path | None) -> None:
    """Print the tables of all finished runs."""
    if not check_results(config.runs(), out):
        raise SettingsError(f"--out {out} holds no finished run of this file")
    found = collect(config, out)
    text = markdown(config, found)
    click.echo(text)
    if json_path is not None:
        write_json(json_path, found)
    if page is not None:
        page.write_text(text, encoding="utf-8")
