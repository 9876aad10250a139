"""The rows of one text, by context length or by windows: what `dape score` does for each document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dape_engine.engine import AsyncEngine
from dape_engine.errors import RequestError
from dape_engine.request import ScoreRequest, Window, WindowScores
from dape_engine.scoring import SCORE_LAST, ladder, window_settings, with_chunk_bos
from dape_engine.statistics import by_position, statistics
from dape_server.cli.report import default_lengths, parse_lengths
from dape_server.cli.score_rows import Row, merged

Progress = Callable[[str, int, int], None]
OPTIONS = ("lengths", "kind", "window", "context_length", "stride", "score_last", "bos")
"""Options of `dape score` that decide what a text's rows are."""


async def score_text(
    engine: AsyncEngine, name: str, text: str, options: Mapping[str, Any], show: Progress
) -> list[Row]:
    """Return the rows of a text.

    Args:
        engine: that computes.
        name: of the text.
        text: to be scored.
        options: those of `OPTIONS`.
        show: is told the name, the tokens read and the tokens to be read.

    Raises:
        RequestError: the text is too short or too long for the options.
    """
    try:
        tokens = _tokens(engine, text, options["bos"])
        by = _score_by_length if options["window"] is None else _score_by_windows
        return await by(engine, name, tokens, options, show)
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
    engine: AsyncEngine, name: str, tokens: tuple[int, ...], options: Mapping[str, Any], show: Progress
) -> list[Row]:
    mode = options["window"]
    given = {key: options[key] for key in ("context_length", "stride", "score_last")}
    settings = window_settings(mode, len(tokens), **given, max_model_len=engine.max_model_len)
    plan = settings.windows(len(tokens))
    bos = engine.tokenizer.bos_token_id
    read = with_chunk_bos(tokens, plan, bos) if mode == "half" and tokens[0] == bos else tokens
    scores = await _run(engine, name, read, plan, show)
    logprobs = [logprob for window in scores for logprob in window.logprobs]
    row = _row(engine, mode, tokens, merged((w.score_from, w.end) for w in plan), logprobs)
    return [replace(row, positions=by_position(scores))]


async def _score_by_length(
    engine: AsyncEngine, name: str, tokens: tuple[int, ...], options: Mapping[str, Any], show: Progress
) -> list[Row]:
    limit = min(engine.max_model_len, len(tokens))
    plan = ladder(
        options["kind"],
        len(tokens),
        parse_lengths(options["lengths"]) if options["lengths"] else default_lengths(limit) or [limit],
        score_last=options["score_last"] or SCORE_LAST,
        max_model_len=engine.max_model_len,
    )
    scores = await _run(engine, name, tokens, plan.windows, show)
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
    engine: AsyncEngine, name: str, tokens: tuple[int, ...], plan: tuple[Window, ...], show: Progress
) -> list[WindowScores]:
    total = sum(window.end - window.start for window in plan)
    scores: list[WindowScores] = []
    done = 0
    async for window in engine.score(ScoreRequest(name, tokens, plan)):
        scores.append(window)
        done += window.window.end - window.window.start
        show(name, done, total)
    return scores
