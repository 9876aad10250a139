"""Perplexity by context length on the same target tokens, the paper's way to show extrapolation.

For several ends in every document, the last 256 tokens before the end are scored with ever more context.
The targets are equal at all lengths, so differences between lengths are effects of context alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dape_engine.engine import AsyncEngine
from dape_engine.errors import RequestError
from dape_engine.request import ScoreRequest, Window
from dape_engine.scoring import covering


@dataclass(frozen=True, slots=True)
class LengthResult:
    """Perplexity at one context length; errors take each end of a document as one sample."""

    length: int
    num_scored: int
    mean_nll: float
    """Natural logarithm, per token."""
    stderr: float
    """Of the perplexity, by the delta method."""
    change_from: int
    """The length that changes are taken from."""
    change: float
    """Of the mean NLL from that length."""
    change_stderr: float
    """Of that change, paired by end."""

    @property
    def perplexity(self) -> float:
        """exp(mean_nll)."""
        return math.exp(self.mean_nll)

    def as_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "length": self.length,
            "num_scored": self.num_scored,
            "perplexity": self.perplexity,
            "stderr": self.stderr,
            "mean_nll": self.mean_nll,
            "change_from": self.change_from,
            "change": self.change,
            "change_stderr": self.change_stderr,
        }


def choose_ends(num_tokens: int, longest: int, count: int) -> list[int]:
    """Return up to `count` ends spread evenly over a document, each with `longest` tokens before it.

    The same tokens are never scored twice as long as the document is long enough for that.
    """
    room = num_tokens - longest
    if room < 0:
        return []
    return sorted({longest + room * (index + 1) // count for index in range(count)})


def choose_targets(
    documents: Sequence[Sequence[int]], lengths: Sequence[int], ends_per_document: int, score_last: int
) -> list[tuple[int, int]]:
    """Return (index of a document, end) for every end; documents too short for all lengths have none.

    Raises:
        RequestError: no document is long enough.
    """
    # The windows of a short length that reach back to cover all targets may begin a little earlier.
    longest = max(*lengths, min(lengths) + score_last)
    found = [
        (index, end)
        for index, document in enumerate(documents)
        for end in choose_ends(len(document), longest, ends_per_document)
    ]
    if not found:
        raise RequestError(f"no document has {longest} tokens", param="lengths")
    return found


async def score_end(
    engine: AsyncEngine, document: Sequence[int], end: int, length: int, score_last: int
) -> float:
    """Return the mean negative log-probability of the last tokens before an end with so much context."""
    windows = covering(end, length, score_last)
    request = ScoreRequest(f"end-{end}-{length}", tuple(document), windows)
    logprobs = [logprob async for scores in engine.score(request) for logprob in scores.logprobs]
    return -math.fsum(logprobs) / score_last


async def score_positions(engine: AsyncEngine, document: Sequence[int], end: int, length: int) -> list[float]:
    """Return the log-probability of every token but the first of the `length` tokens before an end."""
    window = Window(end - length, end, end - length + 1)
    request = ScoreRequest(f"positions-{end}", tuple(document), (window,))
    return [logprob async for scores in engine.score(request) for logprob in scores.logprobs]


async def evaluate_lengths(
    engine: AsyncEngine,
    documents: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    ends_per_document: int,
    score_last: int = 256,
    change_from: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[LengthResult]:
    """Score every end of every document at every length.

    Args:
        engine: a started engine.
        documents: token ids; those shorter than the greatest length are left out.
        lengths: context lengths in tokens, the scored ones included.
        ends_per_document: ends per document.
        score_last: tokens scored before each end (256 in the paper).
        change_from: the length that changes are taken from; if it is not among them, the shortest.
        progress: called with the tokens read so far and in all.

    Raises:
        RequestError: no document is long enough.
    """
    lengths = sorted(lengths)
    targets = choose_targets(documents, lengths, ends_per_document, score_last)
    samples: dict[int, list[float]] = {length: [] for length in lengths}
    done, total = 0, len(targets) * sum(lengths)
    for index, end in targets:
        for length in lengths:
            samples[length].append(await score_end(engine, documents[index], end, length, score_last))
            done += length
            if progress is not None:
                progress(done, total)
    reference = change_from if change_from in samples else lengths[0]
    results = []
    for length in lengths:
        mean, error = mean_and_error(samples[length])
        differences = [a - b for a, b in zip(samples[length], samples[reference], strict=True)]
        scored = len(targets) * score_last
        results.append(
            LengthResult(
                length, scored, mean, math.exp(mean) * error, reference, *mean_and_error(differences)
            )
        )
    return results


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (0 for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
