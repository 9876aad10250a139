"""`dape score`: perplexity of texts, as a whole or by context length; of many of them over many engines."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_engine.scoring import (
    SCORE_LAST,
    LadderKind,
    WindowMode,
)
from dape_server.cli.documents import find_documents
from dape_server.cli.model import running_engine, split_model
from dape_server.cli.options import config_option, settings_options
from dape_server.cli.report import Work, plot_lengths, write_json
from dape_server.cli.score_many import score_documents
from dape_server.cli.score_rows import Reference, Row
from dape_server.cli.score_table import score_table
from dape_server.cli.score_text import score_text


@click.command()
@click.argument("model_and_files", nargs=-1, required=True, metavar="[MODEL] FILE|FOLDER...")
@click.option("--lengths", help="Context lengths in tokens. [default: 128,256,...,16384]")
@click.option(
    "--ladder",
    "kind",
    type=click.Choice(get_args(LadderKind)),
    default="suffix",
    show_default=True,
    help="suffix: the same last tokens with growing context; prefix: the first 128, 256, ... tokens.",
)
@click.option("--window", type=click.Choice(get_args(WindowMode)), help="Score by windows, not by length.")
@click.option("--context-length", type=click.IntRange(2), help="Tokens of one window.")
@click.option("--stride", type=click.IntRange(1), help="Tokens between sliding windows.")
@click.option(
    "--score-last", type=click.IntRange(1), help=f"Tokens scored at the end. [default: {SCORE_LAST}]"
)
@click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="A beginning-of-text token first: as the tokenizer does it, always, or never.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option(
    "--reference",
    "reference_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Numbers that --json wrote for another model: compare token by token.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves to a PNG.")
@click.option(
    "--progress",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that remembers finished documents: the same command goes on where a killed one was.",
)
@click.option(
    "--ray/--no-ray", help="Score many documents at once, as a Ray Data job; needs the extra `ray`."
)
@click.option("--workers", type=click.IntRange(1), help="Engines of --ray. [default: 2]")
@click.option("--ray-address", help="A running Ray cluster, or auto. [default: one for this job]")
@config_option
@settings_options(EngineOptions)
def score(model_and_files: tuple[str, ...], **options: Any) -> None:
    """Print the perplexity of texts, by context length or by windows.

    A FILE that ends with .jsonl holds a document a line, as an object with a field "text"; "-" is standard
    input. Of a FOLDER every such file and every text file is read.
    """
    folder, files = split_model(model_and_files, plain_folders=True)
    if not files:
        raise click.UsageError("expected [MODEL] FILE|FOLDER..., got no file")
    documents = find_documents(files)
    if options["ray"] or options["progress"] is not None:
        score_documents(folder, documents, options)
        return
    for option in ("workers", "ray_address"):
        if options[option] is not None:
            raise SettingsError(f"--{option.replace('_', '-')}: has no meaning without --ray")
    reference = Reference.read(options["reference_path"]) if options["reference_path"] else None
    results = asyncio.run(_score(folder, {document.name: document.read() for document in documents}, options))
    if reference is not None:
        results = {
            name: [replace(row, difference=reference.difference(name, row)) for row in rows]
            for name, rows in results.items()
        }
    Console().print(score_table(folder.name, results, options["window"]))
    if options["json_path"] is not None:
        write_json(
            options["json_path"], {name: [row.as_json() for row in rows] for name, rows in results.items()}
        )
    if options["plot"] is not None:
        _plot(options["plot"], folder.name, results, reference, by_position=options["window"] is not None)


async def _score(folder: Path, texts: dict[str, str], options: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of every file."""
    async with running_engine(folder, options) as engine:
        with Work() as work:
            return {
                name: await score_text(engine, name, text, options, work.show) for name, text in texts.items()
            }


def _plot(
    path: Path, model: str, results: dict[str, list[Row]], reference: Reference | None, *, by_position: bool
) -> None:
    """Draw perplexity by context length, or by the context that tokens had in their windows."""
    curves = {name: [point for row in rows for point in row.points] for name, rows in results.items()}
    references = None
    if reference is not None:
        references = {
            name: [point for row in rows for point in reference.row(name, row.label).points]
            for name, rows in results.items()
        }
    if by_position:
        plot_lengths(
            path, curves, f"{model}: perplexity by position", references, "tokens before, fewer than"
        )
    else:
        plot_lengths(path, curves, f"{model}: perplexity by context length", references)
