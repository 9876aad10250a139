"""From the scores of windows to the statistics of an input and of the corpus."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from dape_engine.request import TokenLogprob, Window, WindowScores
from dape_engine.statistics import (
    PairedDifference,
    Statistics,
    by_position,
    paired_difference,
    statistics,
    stderr_between,
)
from dape_engine.tokenizer import TextTokenizer
from dape_server.arrays import FLOATS, INTEGERS, encode
from dape_server.choices import alternatives
from dape_server.protocol.perplexity import (
    Corpus,
    EncodingFormat,
    InputPerplexity,
    LadderEntry,
    PairedDifferenceEntry,
    PerplexityRequest,
    PositionEntry,
    Totals,
    WindowSpan,
)
from dape_server.scores.inputs import Input
from dape_server.scores.plan import Plan

SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Report:
    """The statistics of one input, as sums and as the answer shows them."""

    totals: Statistics
    num_words: int | None
    rungs: list[tuple[int, Statistics]]
    difference: PairedDifference | None
    own: Sequence[WindowScores]
    """Scores of the windows that the statistics are made of."""
    entry: InputPerplexity


def report(
    index: int,
    given: Input,
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
        size = tokenizer.byte_length(given.token_ids[window.score_from : window.end])
        total += statistics(scored.logprobs, size)
    rungs = [
        (rung.length, statistics(scores[rung.window].logprobs[rung.first : rung.last])) for rung in plan.rungs
    ]
    num_words = _num_words(given, total.num_scored)
    first = 0 if given.bos is None else 1
    entry: InputPerplexity = {
        "index": index,
        # Statically, totals might hold other keys than theirs.
        **_totals(len(given.token_ids), num_words, total, own, rungs),  # type: ignore[typeddict-item]
        "bos": {
            "rule": body.bos,
            "added": given.added_bos,
            "token_id": given.bos,
            "first_token_scored": any(s.window.score_from <= first < s.window.end for s in own),
        },
        "window": plan.used,
        "windows": [span(scored.window) for scored in own],
    }
    if body.return_token_logprobs:
        _add_tokens(entry, given.token_ids, own, body.encoding_format, tokenizer)
    difference = None
    if body.reference is not None:
        reference = body.reference[index]
        if reference is not None:
            difference = paired_difference(_token_logprobs(len(given.token_ids), own), reference)
        entry["paired_difference"] = None if difference is None else _difference(difference)
    return Report(total, num_words, rungs, difference, own, entry)


def corpus(reports: Sequence[Report]) -> Corpus:
    """Return the statistics of all inputs together, by summed NLL and counts."""
    rungs = [
        (same[0][0], sum((rung for _, rung in same), Statistics()))
        for same in zip(*(part.rungs for part in reports), strict=True)
    ]
    total = sum((part.totals for part in reports), Statistics())
    counts = [part.num_words for part in reports if part.num_words is not None]
    answer: Corpus = {
        **_totals(  # type: ignore[typeddict-item]
            sum(part.entry["num_tokens"] for part in reports),
            sum(counts) if len(counts) == len(reports) else None,
            total,
            list(chain.from_iterable(part.own for part in reports)),
            rungs,
        ),
        "stderr_between_inputs": total.perplexity_error(stderr_between(part.totals for part in reports)),
    }
    if any("paired_difference" in part.entry for part in reports):
        differences = [part.difference for part in reports if part.difference is not None]
        answer["paired_difference"] = {
            **_difference(sum(differences, PairedDifference())),
            "stderr_between_inputs": stderr_between(differences),
        }
    return answer


def span(window: Window) -> WindowSpan:
    """Return a window as the answer shows it."""
    return {
        "start": window.start,
        "end": window.end,
        "score_from": window.score_from,
        "num_scored": window.end - window.score_from,
    }


def _num_words(given: Input, num_scored: int) -> int | None:
    """Return the words of a text as lm-eval counts them, where all its tokens were scored."""
    if given.text is None or num_scored < len(given.token_ids) - (given.bos is not None):
        return None
    return len(SPACES.findall(given.text)) + 1


def _totals(
    num_tokens: int,
    num_words: int | None,
    total: Statistics,
    own: Sequence[WindowScores],
    rungs: Sequence[tuple[int, Statistics]],
) -> Totals:
    return {
        "num_tokens": num_tokens,
        "num_scored": total.num_scored,
        "nll_sum": total.nll_sum,
        "mean_nll": total.mean_nll,
        "perplexity": total.perplexity,
        "stderr": total.perplexity_stderr,
        "num_bytes": total.num_bytes or 0,
        "bits_per_byte": total.bits_per_byte,
        "num_words": num_words,
        "word_perplexity": None if num_words is None else total.perplexity_per(num_words),
        "by_position": [
            _position(bucket.start, bucket.end, bucket.statistics) for bucket in by_position(own)
        ],
        "ladder": [_rung(length, rung) for length, rung in rungs],
    }


def _position(start: int, end: int, part: Statistics) -> PositionEntry:
    return {
        "from": start,
        "to": end,
        "num_scored": part.num_scored,
        "nll_sum": part.nll_sum,
        "perplexity": part.perplexity,
        "stderr": part.perplexity_stderr,
    }


def _rung(length: int, part: Statistics) -> LadderEntry:
    return {
        "length": length,
        "num_scored": part.num_scored,
        "nll_sum": part.nll_sum,
        "perplexity": part.perplexity,
        "stderr": part.perplexity_stderr,
    }


def _difference(difference: PairedDifference) -> PairedDifferenceEntry:
    return {
        "num_paired": difference.num_paired,
        "nll_sum": difference.nll_sum,
        "reference_nll_sum": difference.reference_nll_sum,
        "mean_difference": difference.mean_difference,
        "stderr": difference.stderr,
        "perplexity_ratio": difference.perplexity_ratio,
    }


def _add_tokens(
    entry: InputPerplexity,
    token_ids: tuple[int, ...],
    own: Sequence[WindowScores],
    encoding: EncodingFormat,
    tokenizer: TextTokenizer,
) -> None:
    """Add what is known of every token; nothing of those that were not scored."""
    logprobs = _token_logprobs(len(token_ids), own)
    packed = encoding == "base64"
    entry["token_ids"] = encode(token_ids, INTEGERS) if packed else list(token_ids)
    entry["token_logprobs"] = encode(logprobs, FLOATS) if packed else logprobs
    if any(scored.top for scored in own):
        entry["top_logprobs"] = _top_logprobs(token_ids, own, tokenizer)


def _token_logprobs(num_tokens: int, own: Sequence[WindowScores]) -> list[float | None]:
    """Return the log-probability of every token; None for those that were not scored."""
    logprobs: list[float | None] = [None] * num_tokens
    for scored in own:
        first = scored.window.score_from
        logprobs[first : first + len(scored.logprobs)] = scored.logprobs
    return logprobs


def _top_logprobs(
    token_ids: tuple[int, ...], own: Sequence[WindowScores], tokenizer: TextTokenizer
) -> list[dict[str, float] | None]:
    top: list[dict[str, float] | None] = [None] * len(token_ids)
    for scored in own:
        first = scored.window.score_from
        for place, likeliest in enumerate(scored.top, first):
            token = TokenLogprob(token_ids[place], scored.logprobs[place - first], likeliest)
            top[place] = alternatives(token, tokenizer.token_text)
    return top
