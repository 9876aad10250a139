"""`dape bench`: what the kernels and the engine reach on this machine."""

from __future__ import annotations

import click

from dape_server.cli import LazyGroup


@click.group(
    cls=LazyGroup,
    modules={name: f"dape_server.cli.bench_{name}" for name in ("kernels", "engine", "serve", "cost")},
)
def bench() -> None:
    """Measure the attention kernels, the whole engine or the server, beside alternatives."""
