"""`dape score`: perplexity of text files, as a whole or by context length."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table

from dape_engine.engine import AsyncEngine
from dape_engine.errors import RequestError, SettingsError
from dape_engine.options import EngineOptions
from dape_engine.request import ScoreRequest, Window, WindowScores
from dape_engine.scoring import (
    SCORE_LAST,
    LadderKind,
    WindowMode,
    ladder,
    window_settings,
    with_chunk_bos,
)
from dape_engine.statistics import PairedDifference, Statistics, by_position, statistics
from dape_server.cli.model import running_engine, split_model
from dape_server.cli.options import config_option, settings_options
from dape_server.cli.report import Work, default_lengths, parse_lengths, plot_lengths, write_json
from dape_server.cli.score_rows import Reference, Row, merged

ALL_FILES = "all files"


@click.command()
@click.argument("model_and_files", nargs=-1, required=True, metavar="[MODEL] FILE...")
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
@config_option
@settings_options(EngineOptions)
def score(model_and_files: tuple[str, ...], **options: Any) -> None:
    """Print the perplexity of text files ("-" reads standard input), by context length or by windows."""
    folder, files = split_model(model_and_files)
    if not files:
        raise click.UsageError("expected [MODEL] FILE..., got no file")
    reference = Reference.read(options["reference_path"]) if options["reference_path"] else None
    results = asyncio.run(_score(folder, {name: _read(name) for name in files}, options))
    if reference is not None:
        results = {
            name: [replace(row, difference=reference.difference(name, row)) for row in rows]
            for name, rows in results.items()
        }
    Console().print(_table(folder.name, results, options["window"]))
    if options["json_path"] is not None:
        write_json(
            options["json_path"], {name: [row.as_json() for row in rows] for name, rows in results.items()}
        )
    if options["plot"] is not None:
        _plot(options["plot"], folder.name, results, reference, by_position=options["window"] is not None)


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name} is not UTF-8 text: byte {error.start} is not valid") from error


async def _score(folder: Path, texts: dict[str, str], options: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of every file."""
    async with running_engine(folder, options) as engine:
        with Work() as work:
            return {
                name: await _score_text(engine, name, text, options, work) for name, text in texts.items()
            }


async def _score_text(
    engine: AsyncEngine, name: str, text: str, options: dict[str, Any], work: Work
) -> list[Row]:
    try:
        tokens = _tokens(engine, text, options["bos"])
        by = _score_by_length if options["window"] is None else _score_by_windows
        return await by(engine, name, tokens, options, work)
    except RequestError as error:
        raise RequestError(f"{name}: {error.message}") from error


def _tokens(engine: AsyncEngine, text: str, bos: str) -> tuple[int, ...]:
    ids = engine.tokenizer.encode(text, add_special_tokens=bos != "never")
    first = engine.tokenizer.bos_token_id
    if bos == "always" and first is None:
        raise RequestError("this model has no beginning-of-text token")
    if bos == "always" and first is not None and ids[:1] != [first]:
        return (first, *ids)
    return tuple(ids)


async def _score_by_windows(
    engine: AsyncEngine, name: str, tokens: tuple[int, ...], options: dict[str, Any], work: Work
) -> list[Row]:
    mode = options["window"]
    given = {key: options[key] for key in ("context_length", "stride", "score_last")}
    settings = window_settings(mode, len(tokens), **given, max_model_len=engine.max_model_len)
    plan = settings.windows(len(tokens))
    bos = engine.tokenizer.bos_token_id
    read = with_chunk_bos(tokens, plan, bos) if mode == "half" and tokens[0] == bos else tokens
    scores = await _run(engine, name, read, plan, work)
    logprobs = [logprob for window in scores for logprob in window.logprobs]
    row = _row(engine, mode, tokens, merged((w.score_from, w.end) for w in plan), logprobs)
    return [replace(row, positions=by_position(scores))]


async def _score_by_length(
    engine: AsyncEngine, name: str, tokens: tuple[int, ...], options: dict[str, Any], work: Work
) -> list[Row]:
    limit = min(engine.max_model_len, len(tokens))
    plan = ladder(
        options["kind"],
        len(tokens),
        parse_lengths(options["lengths"]) if options["lengths"] else default_lengths(limit) or [limit],
        score_last=options["score_last"] or SCORE_LAST,
        max_model_len=engine.max_model_len,
    )
    scores = await _run(engine, name, tokens, plan.windows, work)
    rows = []
    for rung in plan.rungs:
        begin = plan.windows[rung.window].score_from
        logprobs = scores[rung.window].logprobs[rung.first : rung.last]
        rows.append(_row(engine, rung.length, tokens, ((begin + rung.first, begin + rung.last),), logprobs))
    return rows


def _row(
    engine: AsyncEngine,
    label: int | str,
    tokens: tuple[int, ...],
    ranges: tuple[tuple[int, int], ...],
    logprobs: Sequence[float],
) -> Row:
    ids = [token for begin, end in ranges for token in tokens[begin:end]]
    return Row(label, statistics(logprobs, engine.tokenizer.byte_length(ids)), ranges, ids, logprobs)


async def _run(
    engine: AsyncEngine, name: str, tokens: tuple[int, ...], plan: tuple[Window, ...], work: Work
) -> list[WindowScores]:
    total = sum(window.end - window.start for window in plan)
    scores: list[WindowScores] = []
    done = 0
    async for window in engine.score(ScoreRequest(name, tokens, plan)):
        scores.append(window)
        done += window.window.end - window.window.start
        work.show(name, done, total)
    return scores


def _table(model: str, results: dict[str, list[Row]], window: str | None) -> Table:
    compared = any(row.difference for rows in results.values() for row in rows)
    caption = "difference: mean NLL less the reference's, of the tokens that both score" if compared else None
    table = Table(title=f"{model}: perplexity", caption=caption, box=SIMPLE_HEAVY)
    table.add_column("file", overflow="fold", min_width=len(ALL_FILES))
    table.add_column("window" if window else "length", justify="left" if window else "right", no_wrap=True)
    # Where both do not fit a narrow terminal, the difference tells more than the logarithm of the perplexity.
    columns = ("scored", "perplexity", "bits/byte", "difference" if compared else "mean NLL")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, rows in results.items():
        for place, row in enumerate(rows):
            cells = _cells(row.label, row.statistics, row.difference)
            table.add_row("" if place else name, *cells)
        if len(rows) > 1:
            table.add_section()
    table.add_section()
    for place, (label, total, difference) in enumerate(_totals(results)):
        table.add_row("" if place else ALL_FILES, *_cells(label, total, difference), style="bold")
    return table


def _totals(results: dict[str, list[Row]]) -> list[tuple[int | str, Statistics, PairedDifference | None]]:
    """Return the sums of several files at each length that all of them have, or of their windows."""
    if len(results) < 2:
        return []
    totals = []
    for first in next(iter(results.values())):
        same = [row for rows in results.values() for row in rows if row.label == first.label]
        if len(same) == len(results):
            differences = [row.difference for row in same if row.difference is not None]
            totals.append(
                (
                    first.label,
                    sum((row.statistics for row in same), Statistics()),
                    sum(differences, PairedDifference()) if differences else None,
                )
            )
    return totals


def _cells(label: int | str, numbers: Statistics, difference: PairedDifference | None) -> list[str]:
    cells = [
        str(label),
        str(numbers.num_scored),
        f"{_number(numbers.perplexity, 3)} ± {_number(numbers.perplexity_stderr, 3)}",
        _number(numbers.bits_per_byte, 4),
    ]
    if difference is None or difference.mean_difference is None:
        return [*cells, _number(numbers.mean_nll, 4)]
    return [*cells, f"{difference.mean_difference:+.4f} ± {_number(difference.stderr, 4)}"]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


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
