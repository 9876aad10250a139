"""`dape bench kernels`: attention beside alternatives, the processor's peak and a plain read of memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dape_engine.config import MAX_DAPE_WIDTH, MAX_HEAD_DIM, MAX_HEADS
from dape_engine.errors import SettingsError
from dape_kernels.bench.cases import Setup, default_working_set
from dape_kernels.bench.report import Figure, Report, run
from dape_kernels.bench.workload import Shape
from dape_server.cli.report import Work, parse_lengths, write_json

LENGTHS = "2048,4096,8192,16384"
QUICK_LENGTHS = "2048"
REPEATS, QUICK_REPEATS = 7, 3
# Columns of the tables.
PREFILL = ("cpu_ns_per_pair", "gflops_per_core", "share_of_peak", "wall_ms")
DECODE = ("wall_ms", "gb_per_s", "share_of_read")


@click.command()
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option("--heads", type=click.IntRange(1, MAX_HEADS), default=12, show_default=True)
@click.option("--head-dim", type=click.IntRange(1, MAX_HEAD_DIM), default=64, show_default=True)
@click.option("--width", type=click.IntRange(1, MAX_DAPE_WIDTH), default=32, show_default=True)
@click.option("--lengths", help=f"Tokens of a prefill. [default: {LENGTHS}]")
@click.option("--keys", type=click.IntRange(1), default=16384, show_default=True, help="Cached, in decoding.")
@click.option("--repeats", type=click.IntRange(1), help=f"Rounds of everything. [default: {REPEATS}]")
@click.option(
    "--plain-limit",
    type=click.IntRange(0),
    default=2048,
    show_default=True,
    help="Longest prefill in plain PyTorch, which stores every pair.",
)
@click.option(
    "--working-set-mib",
    type=click.IntRange(1),
    help="Keys and values that decoding walks through. [default: twice the last-level cache, at most 512]",
)
@click.option("--quick", is_flag=True, help=f"{QUICK_REPEATS} rounds, a prefill of {QUICK_LENGTHS} only.")
def kernels(
    json_path: Path | None,
    heads: int,
    head_dim: int,
    width: int,
    lengths: str | None,
    keys: int,
    repeats: int | None,
    plain_limit: int,
    working_set_mib: int | None,
    quick: bool,
) -> None:
    """Measure one attention layer: prefill by processor time, decoding by wall time, medians of many rounds.

    DAPE_CPU_ISA=avx512|avx2|portable chooses the instruction set, OMP_NUM_THREADS the number of threads.
    """
    wanted = parse_lengths(lengths or (QUICK_LENGTHS if quick else LENGTHS))
    setup = Setup(
        Shape(heads, head_dim, width),
        tuple(wanted),
        keys,
        repeats or (QUICK_REPEATS if quick else REPEATS),
        plain_limit,
        default_working_set() if working_set_mib is None else working_set_mib << 20,
    )
    try:
        with Work("rounds") as work:
            report = run(setup, work.show)
    except ValueError as error:  # a wrong setting in the environment
        raise SettingsError(str(error)) from error
    _show(report)
    if json_path is not None:
        write_json(json_path, asdict(report))


def _show(report: Report) -> None:
    console = Console()
    machine = [str(report.machine[name]) for name in ("processor", "kernels")]
    console.print(*machine, f"{report.machine['threads']} threads", sep=", ", highlight=False)
    console.print(_rows(report, "prefill", PREFILL))
    console.print(_rows(report, "decode", DECODE))
    if report.figures:
        console.print(_figures(report.figures))
    for what, why in report.left_out.items():
        console.print(f"left out: {what}: {why}", highlight=False)


def _rows(report: Report, phase: str, columns: tuple[str, ...]) -> Table:
    table = Table("tokens", "kernel", "dtype", "DAPE", title=phase)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in report.rows:
        if row["phase"] == phase:
            dape = {True: "on", False: "off", None: ""}[row["dape"]]
            cells = [_number(row.get(column)) for column in columns]
            table.add_row(str(row["tokens"]), row["kernel"], row["dtype"], dape, *cells)
    return table


def _figures(figures: dict[str, Figure]) -> Table:
    table = Table("figure", "of", "value", title="figures")
    for name, figure in figures.items():
        parts = figure.items() if isinstance(figure, dict) else [("", figure)]
        for part, value in parts:
            table.add_row(name, part, _number(value))
    return table


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
