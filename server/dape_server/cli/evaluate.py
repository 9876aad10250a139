"""`dape evaluate`: perplexity by context length on a corpus, for one or several models or for a sweep."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dape_engine.errors import SettingsError
from dape_engine.options import EngineOptions
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_server.cli.evaluate_sweep import evaluate_sweep, sweep_options
from dape_server.cli.model import running_engine
from dape_server.cli.options import config_option, settings_options
from dape_server.cli.report import LENGTHS, Work, default_lengths, parse_lengths, plot_lengths
from dape_training.data import read_documents
from dape_training.evaluate import LengthResult, evaluate_lengths
from dape_training.sweep_evaluate import Protocol


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL...]")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSON Lines, .xz or plain, with a "text" field per document.',
)
@sweep_options
@click.option("--lengths", help="Context lengths in tokens. [default: 128,256,...,16384]")
@click.option("--ends", type=click.IntRange(1), default=3, show_default=True, help="Ends per document.")
@click.option("--score-last", type=click.IntRange(1), default=256, show_default=True)
@click.option("--documents", type=click.IntRange(1), help="Use the first so many documents only.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves to a PNG.")
@config_option
@settings_options(EngineOptions)
def evaluate(
    models: tuple[str, ...],
    data: Path | None,
    sweep: Path | None,
    runs: Path | None,
    corpus: Path,
    collect: Path | None,
    lengths: str | None,
    ends: int,
    score_last: int,
    documents: int | None,
    json_path: Path | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Measure perplexity by context length, scoring the same tokens at every length.

    With --sweep: every finished run of a sweep, each once; the numbers stay in the run's folder.
    """
    if sweep is not None:
        if data or models or documents or json_path or plot:
            raise SettingsError("--sweep takes data and models from its file and --runs; leave them out")
        scored = tuple(parse_lengths(lengths)) if lengths else LENGTHS
        protocol = Protocol(scored, ends, score_last, options["dtype"] or "auto")
        evaluate_sweep(sweep, runs, corpus, collect, protocol, options)
        return
    if data is None:
        raise SettingsError("expected --data FILE, or --sweep FILE")
    try:
        texts = read_documents(data)[:documents]
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"--data {data}: expected JSON Lines with a text field ({error!r})") from error
    names = models or (DEFAULT_MODEL,)
    wanted = parse_lengths(lengths) if lengths else None
    results = {
        name: asyncio.run(_evaluate(resolve_model(name), texts, wanted, ends, score_last, options))
        for name in names
    }
    Console().print(_table(results, f"{data.name}: last {score_last} tokens of {ends} ends per document"))
    if json_path is not None:
        settings = {"data": data.name, "ends_per_document": ends, "score_last": score_last}
        rows = {Path(name).name: [row.as_json() for row in result] for name, result in results.items()}
        json_path.write_text(json.dumps({"settings": settings, "models": rows}, indent=2) + "\n")
    if plot is not None:
        curves = {
            Path(name).name: [(row.length, row.perplexity, row.stderr) for row in result]
            for name, result in results.items()
        }
        plot_lengths(plot, curves, f"Perplexity of the last {score_last} tokens by context length")


async def _evaluate(
    folder: Path,
    texts: list[str],
    lengths: list[int] | None,
    ends: int,
    score_last: int,
    options: dict[str, Any],
) -> list[LengthResult]:
    async with running_engine(folder, options) as engine:
        tokens = [engine.tokenizer.encode(text) for text in texts]
        with Work() as work:
            return await evaluate_lengths(
                engine,
                tokens,
                lengths or default_lengths(engine.max_model_len),
                ends_per_document=ends,
                score_last=score_last,
                change_from=engine.config.train_length,
                progress=partial(work.show, engine.model_name),
            )


def _table(results: dict[str, list[LengthResult]], title: str) -> Table:
    table = Table("length", title=title)
    for name in results:
        table.add_column(f"{Path(name).name}: perplexity", justify="right")
        table.add_column(f"NLL change from {results[name][0].change_from}", justify="right")
    for rows in zip(*results.values(), strict=True):
        cells = [str(rows[0].length)]
        for row in rows:
            cells.append(f"{row.perplexity:.2f} ± {row.stderr:.2f}")
            cells.append(f"{row.change:+.4f} ± {row.change_stderr:.4f}")
        table.add_row(*cells)
    return table
