"""`dape train`: train a model from a YAML file; called again, it goes on where it stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ValidationError

from dape_engine.errors import SettingsError


@click.command()
@click.option(
    "--config",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Model, data and optimiser: see configs/.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder; a checkpoint in it is resumed. [default: runs/<name of the config>]",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Replace a setting of the file, e.g. --set steps=100; may be given several times.",
)
def train(config: Path, out: Path | None, overrides: tuple[str, ...]) -> None:
    """Train a model on JSON Lines text, with checkpoints, tensorboard events and a progress bar."""
    try:
        from dape_training.config import load_training_config
        from dape_training.trainer import train as run
    except ImportError as error:
        raise SettingsError(
            f"training needs the extra packages: pip install 'dape-serve[train]' ({error})"
        ) from error
    # A line for every file of every checkpoint would bury the losses.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    try:
        settings = load_training_config(config, dict(_parse(item) for item in overrides))
        run(settings, out or Path("runs") / config.stem)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{config}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{config}: {' '.join(str(error).split())}") from error


def _parse(item: str) -> tuple[str, Any]:
    name, separator, value = item.partition("=")
    if not separator:
        raise SettingsError(f"--set {item}: expected NAME=VALUE")
    return name, yaml.safe_load(value)
