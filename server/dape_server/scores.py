"""From a perplexity request to the windows of each input, and from their scores to the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dape_engine.request import TokenLogprob, Window, WindowScores
from dape_engine.scoring import (
    SCORE_LAST,
    Rung,
    Statistics,
    by_position,
    ladder,
    statistics,
    windows,
    with_chunk_bos,
)
from dape_engine.tokenizer import TextTokenizer
from dape_server.choices import alternatives
from dape_server.protocol.perplexity import (
    Corpus,
    InputPerplexity,
    LadderEntry,
    PerplexityRequest,
    Totals,
    WindowSpan,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is scored of one input."""

    token_ids: tuple[int, ...]
    """As the model reads them."""
    windows: tuple[Window, ...]
    num_own: int
    """The first so many windows give the input's own statistics, the others only the ladder's."""
    rungs: tuple[Rung, ...]


def make_plan(
    body: PerplexityRequest, token_ids: tuple[int, ...], bos_token_id: int | None, max_model_len: int
) -> Plan:
    """Return the windows of one input.

    Raises:
        RequestError: settings are out of range or do not fit the input.
    """
    own = _own_windows(body, len(token_ids), max_model_len)
    chosen = list(own)
    rungs: tuple[Rung, ...] = ()
    if body.lengths is not None:
        steps = ladder(
            body.ladder or "prefix",
            len(token_ids),
            body.lengths,
            score_last=_score_last(body),
            max_model_len=max_model_len,
        )
        places = [_place(window, own, chosen) for window in steps.windows]
        rungs = tuple(_moved(rung, *places[rung.window]) for rung in steps.rungs)
    if body.window == "half" and token_ids[0] == bos_token_id:
        # An input that begins with BOS is of a model that expects it in every context.
        token_ids = with_chunk_bos(token_ids, own, bos_token_id)
    return Plan(token_ids, tuple(chosen), len(own), rungs)


def _score_last(body: PerplexityRequest) -> int:
    return SCORE_LAST if body.score_last is None else body.score_last


def _own_windows(body: PerplexityRequest, num_tokens: int, max_model_len: int) -> tuple[Window, ...]:
    only_ladder = body.window is None and (body.context_length, body.stride) == (None, None)
    if body.lengths is not None and only_ladder and num_tokens > max_model_len:
        greatest = [max(body.lengths)]
        kind = body.ladder or "prefix"
        return ladder(
            kind, num_tokens, greatest, score_last=_score_last(body), max_model_len=max_model_len
        ).windows
    mode = body.window or "full"
    return windows(
        mode,
        num_tokens,
        context_length=body.context_length,
        stride=body.stride,
        score_last=body.score_last if mode == "last" or body.lengths is None else None,
        max_model_len=max_model_len,
    )


def _place(wanted: Window, own: Sequence[Window], chosen: list[Window]) -> tuple[int, int]:
    """Return the window that gives the wanted scores, and how many of its scores come before them.

    A score depends on nothing behind it, so a longer window with the same start serves a shorter one.
    """
    for index, window in enumerate(own):
        serves = window.score_from <= wanted.score_from and window.end >= wanted.end
        if window.start == wanted.start and serves:
            return index, wanted.score_from - window.score_from
    chosen.append(wanted)
    return len(chosen) - 1, 0


def _moved(rung: Rung, window: int, shift: int) -> Rung:
    return Rung(rung.length, window, rung.first + shift, rung.last + shift)


@dataclass(frozen=True, slots=True)
class Report:
    """The statistics of one input, as sums and as the answer shows them."""

    totals: Statistics
    rungs: list[tuple[int, Statistics]]
    entry: InputPerplexity


def report(
    index: int,
    token_ids: tuple[int, ...],
    plan: Plan,
    scores: Sequence[WindowScores],
    body: PerplexityRequest,
    tokenizer: TextTokenizer,
) -> Report:
    """Return the statistics of one input from the scores of all its windows.

    Raises:
        StepError: a log-probability is not finite.
    """
    own = scores[: plan.num_own]
    total = Statistics()
    for scored in own:
        window = scored.window
        size = tokenizer.byte_length(token_ids[window.score_from : window.end])
        total += statistics(scored.logprobs, size)
    rungs = [
        (rung.length, statistics(scores[rung.window].logprobs[rung.first : rung.last])) for rung in plan.rungs
    ]
    entry: InputPerplexity = {
        "index": index,
        # Statically, totals might hold other keys than theirs.
        **_totals(len(token_ids), total),  # type: ignore[typeddict-item]
        "by_position": [
            {
                "from": bucket.start,
                "to": bucket.end,
                "num_scored": bucket.statistics.num_scored,
                "nll_sum": bucket.statistics.nll_sum,
                "perplexity": bucket.statistics.perplexity,
            }
            for bucket in by_position(own)
        ],
        "ladder": [_ladder_entry(length, rung) for length, rung in rungs],
        "windows": [span(scored.window) for scored in own],
    }
    if body.return_token_logprobs:
        _add_tokens(entry, token_ids, own, tokenizer)
    return Report(total, rungs, entry)


def corpus(reports: Sequence[Report]) -> Corpus:
    """Return the statistics of all inputs together, by summed NLL and counts."""
    total = sum((part.totals for part in reports), Statistics())
    by_rung = zip(*(part.rungs for part in reports), strict=True)
    return {
        **_totals(sum(part.entry["num_tokens"] for part in reports), total),
        "ladder": [
            _ladder_entry(same[0][0], sum((rung for _, rung in same), Statistics())) for same in by_rung
        ],
    }


def span(window: Window) -> WindowSpan:
    """Return a window as the answer shows it."""
    return {"start": window.start, "end": window.end, "score_from": window.score_from}


def _totals(num_tokens: int, total: Statistics) -> Totals:
    return {
        "num_tokens": num_tokens,
        "num_scored": total.num_scored,
        "nll_sum": total.nll_sum,
        "mean_nll": total.mean_nll,
        "perplexity": total.perplexity,
        "stderr": total.perplexity_stderr,
        "bits_per_byte": total.bits_per_byte,
    }


def _ladder_entry(length: int, rung: Statistics) -> LadderEntry:
    return {
        "length": length,
        "num_scored": rung.num_scored,
        "nll_sum": rung.nll_sum,
        "perplexity": rung.perplexity,
    }


def _add_tokens(
    entry: InputPerplexity,
    token_ids: tuple[int, ...],
    own: Sequence[WindowScores],
    tokenizer: TextTokenizer,
) -> None:
    """Add what is known of every token; nothing of those that were not scored."""
    logprobs: list[float | None] = [None] * len(token_ids)
    top: list[dict[str, float] | None] = [None] * len(token_ids)
    for scored in own:
        first = scored.window.score_from
        logprobs[first : first + len(scored.logprobs)] = scored.logprobs
        for place, likeliest in enumerate(scored.top, first):
            token = TokenLogprob(token_ids[place], scored.logprobs[place - first], likeliest)
            top[place] = alternatives(token, tokenizer.token_text)
    entry["token_ids"] = list(token_ids)
    entry["token_logprobs"] = logprobs
    if any(scored.top for scored in own):
        entry["top_logprobs"] = top
