"""The `dape` command: serve, generate, score, evaluate, train, che, visualize, convert, bench, backends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

# Waiting OpenMP threads must sleep, not spin: with a busy neighbour on the machine every parallel
# region would otherwise wait for a time slice. Has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
from rich.logging import RichHandler

from dape_engine.errors import DapeError

COMMANDS = (
    *("serve", "generate", "score", "evaluate"),
    *("train", "che", "visualize", "convert", "bench", "backends"),
)


class LazyGroup(click.Group):
    """Imports a command's module when it is called, so that `dape --help` is quick.

    Args:
        modules: the module of each command; it holds the command under the same name.
        arguments: as for `click.Group`.
    """

    def __init__(self, *, modules: Mapping[str, str], **arguments: Any):
        super().__init__(**arguments)
        self._modules = modules

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self._modules)

    def get_command(self, _: click.Context, name: str) -> click.Command | None:
        if name not in self._modules:
            return None
        command: click.Command = getattr(import_module(self._modules[name]), name)
        return command


@click.group(
    cls=LazyGroup,
    modules={name: f"dape_server.cli.{name}" for name in COMMANDS},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="dape-serve", prog_name="dape")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def cli(verbose: bool) -> None:
    """Serve, score and train models with data-adaptive positional encoding (DAPE)."""
    terminal = sys.stderr.isatty()
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(message)s" if terminal else "%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[RichHandler(show_path=False)] if terminal else None,
    )


def main() -> None:
    """Run the command line; a known error is one line on stderr and exit code 2."""
    try:
        cli()
    except DapeError as error:
        click.echo(f"dape: {error.message}", err=True)
        sys.exit(2)
