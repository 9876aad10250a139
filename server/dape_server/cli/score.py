"""`dape score`: perplexity of text files, as a whole or by context length."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from dape_engine.engine import AsyncEngine
from dape_engine.errors import RequestError, SettingsError
from dape_engine.options import EngineOptions
from dape_engine.request import ScoreRequest, Window, WindowScores
from dape_engine.scoring import (
    SCORE_LAST,
    LadderKind,
    Statistics,
    WindowMode,
    ladder,
    statistics,
    windows,
)
from dape_server.cli.model import running_engine, split_model
from dape_server.cli.options import config_option, settings_options
from dape_server.cli.report import Work, default_lengths, parse_lengths, plot_lengths


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
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves to a PNG.")
@config_option
@settings_options(EngineOptions)
def score(model_and_files: tuple[str, ...], **options: Any) -> None:
    """Print the perplexity of text files ("-" reads standard input), by context length or by windows."""
    folder, files = split_model(model_and_files)
    if not files:
        raise click.UsageError("expected [MODEL] FILE..., got no file")
    if options["plot"] and options["window"]:
        raise click.UsageError("--plot draws perplexity by length, so it cannot go with --window")
    results = asyncio.run(_score(folder, {name: _read(name) for name in files}, options))
    Console().print(_table(results, by_length=options["window"] is None))
    if options["json_path"] is not None:
        options["json_path"].write_text(json.dumps(_as_json(results), indent=2) + "\n")
    if options["plot"] is not None:
        curves = {
            name: [
                (int(label), row.perplexity or 0.0, row.perplexity_stderr or 0.0)
                for label, row in rows.items()
            ]
            for name, rows in results.items()
        }
        plot_lengths(options["plot"], curves, f"{folder.name}: perplexity by context length")


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name} is not UTF-8 text: byte {error.start} is not valid") from error


async def _score(
    folder: Path, texts: dict[str, str], options: dict[str, Any]
) -> dict[str, dict[str, Statistics]]:
    """Return statistics by file, and by context length or window mode."""
    async with running_engine(folder, options) as engine:
        with Work() as work:
            return {
                name: await _score_text(engine, name, text, options, work) for name, text in texts.items()
            }


async def _score_text(
    engine: AsyncEngine, name: str, text: str, options: dict[str, Any], work: Work
) -> dict[str, Statistics]:
    tokens = tuple(engine.tokenizer.encode(text))
    try:
        by = _score_by_length if options["window"] is None else _score_by_windows
        return await by(engine, name, tokens, options, work)
    except RequestError as error:
        raise RequestError(f"{name}: {error.message}") from error


async def _score_by_windows(
    engine: AsyncEngine, name: str, tokens: tuple[int, ...], options: dict[str, Any], work: Work
) -> dict[str, Statistics]:
    settings = {key: options[key] for key in ("context_length", "stride", "score_last")}
    plan = windows(options["window"], len(tokens), **settings, max_model_len=engine.max_model_len)
    scores = await _run(engine, name, tokens, plan, work)
    logprobs = [logprob for window in scores for logprob in window.logprobs]
    scored = [token for window in plan for token in tokens[window.score_from : window.end]]
    return {options["window"]: statistics(logprobs, engine.tokenizer.byte_length(scored))}


async def _score_by_length(
    engine: AsyncEngine, name: str, tokens: tuple[int, ...], options: dict[str, Any], work: Work
) -> dict[str, Statistics]:
    limit = engine.max_model_len
    lengths = options["lengths"]
    plan = ladder(
        options["kind"],
        len(tokens),
        parse_lengths(lengths) if lengths else default_lengths(min(limit, len(tokens))),
        score_last=options["score_last"] or SCORE_LAST,
        max_model_len=limit,
    )
    scores = await _run(engine, name, tokens, plan.windows, work)
    results = {}
    for rung in plan.rungs:
        begin = plan.windows[rung.window].score_from
        scored = tokens[begin + rung.first : begin + rung.last]
        logprobs = scores[rung.window].logprobs[rung.first : rung.last]
        results[str(rung.length)] = statistics(logprobs, engine.tokenizer.byte_length(scored))
    return results


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


def _table(results: dict[str, dict[str, Statistics]], by_length: bool) -> Table:
    table = Table("file", "length" if by_length else "window")
    for column in ("tokens scored", "mean NLL", "perplexity", "bits per byte"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, rows in results.items():
        for label, row in rows.items():
            table.add_row(
                name,
                label,
                str(row.num_scored),
                _number(row.mean_nll, 4),
                f"{_number(row.perplexity, 3)} ± {_number(row.perplexity_stderr, 3)}",
                _number(row.bits_per_byte, 4),
            )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _as_json(results: dict[str, dict[str, Statistics]]) -> dict[str, Any]:
    return {
        name: [
            {
                "length" if label.isdigit() else "window": int(label) if label.isdigit() else label,
                "num_scored": row.num_scored,
                "nll_sum": row.nll_sum,
                "mean_nll": row.mean_nll,
                "perplexity": row.perplexity,
                "stderr": row.perplexity_stderr,
                "bits_per_byte": row.bits_per_byte,
            }
            for label, row in rows.items()
        ]
        for name, rows in results.items()
    }
