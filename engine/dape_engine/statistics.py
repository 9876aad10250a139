"""Statistics of the log-probabilities of scored tokens: perplexity, its error, differences between models.

Natural logarithms throughout; totals are sums of negative log-likelihoods (NLL) and counts, never averages
of averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dape_engine.errors import StepError
from dape_engine.request import WindowScores


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over scored tokens; adding two gives the statistics of both together."""

    num_scored: int = 0
    nll_sum: float = 0.0
    nll_square_sum: float = 0.0
    num_bytes: int | None = 0
    """UTF-8 bytes of the scored tokens; None: not known."""

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.num_scored + other.num_scored,
            self.nll_sum + other.nll_sum,
            self.nll_square_sum + other.nll_square_sum,
            _sum_known(self.num_bytes, other.num_bytes),
        )

    @property
    def mean_nll(self) -> float | None:
        """Mean NLL of a token in nats; None where nothing was scored."""
        return self.nll_sum / self.num_scored if self.num_scored else None

    @property
    def perplexity(self) -> float | None:
        """exp(mean_nll); None where nothing was scored or the value is beyond a float."""
        return None if self.mean_nll is None else _finite_exp(self.mean_nll)

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of the perplexity, as llama.cpp prints it.

        It is that of `mean_nll` with tokens taken as independent. None for fewer than two tokens or where the
        perplexity is None.
        """
        if self.mean_nll is None or self.num_scored < 2:
            return None
        return self.perplexity_error(_standard_error(self.num_scored, self.mean_nll, self.nll_square_sum))

    def perplexity_error(self, error: float | None) -> float | None:
        """Return the error of the perplexity that an error of `mean_nll` makes, by the delta method."""
        if error is None or self.perplexity is None:
            return None
        product = self.perplexity * error
        return product if math.isfinite(product) else None

    def perplexity_per(self, count: int) -> float | None:
        """Return the perplexity of a unit of which there are `count`, such as a word."""
        return _finite_exp(self.nll_sum / count) if count else None

    @property
    def bits_per_byte(self) -> float | None:
        """NLL in bits per UTF-8 byte of the scored tokens; None where their bytes are unknown or none."""
        return self.nll_sum / math.log(2) / self.num_bytes if self.num_bytes else None


def statistics(logprobs: Sequence[float], num_bytes: int | None = None) -> Statistics:
    """Return the statistics of the log-probabilities of scored tokens.

    Raises:
        StepError: a value is not finite.
    """
    values = np.array(logprobs, dtype=np.float64)
    if not np.isfinite(values).all():
        raise StepError("a log-probability is not finite")
    return Statistics(len(logprobs), -math.fsum(logprobs), float(values @ values), num_bytes)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Sums over the tokens that have both an NLL and a reference; adding two gives those of both together.

    The difference of each token is its NLL less the reference's, so below 0 is better than the reference.
    """

    num_paired: int = 0
    nll_sum: float = 0.0
    reference_nll_sum: float = 0.0
    difference_square_sum: float = 0.0

    def __add__(self, other: PairedDifference) -> PairedDifference:
        return PairedDifference(
            self.num_paired + other.num_paired,
            self.nll_sum + other.nll_sum,
            self.reference_nll_sum + other.reference_nll_sum,
            self.difference_square_sum + other.difference_square_sum,
        )

    @property
    def mean_difference(self) -> float | None:
        """Mean difference of a token in nats; None where nothing is paired."""
        return (self.nll_sum - self.reference_nll_sum) / self.num_paired if self.num_paired else None

    @property
    def stderr(self) -> float | None:
        """Standard error of `mean_difference`, taking tokens as independent; None for fewer than two.

        What makes a token hard is hard for both, so this is far below the errors of two perplexities.
        """
        if self.mean_difference is None or self.num_paired < 2:
            return None
        return _standard_error(self.num_paired, self.mean_difference, self.difference_square_sum)

    @property
    def perplexity_ratio(self) -> float | None:
        """The perplexity over the reference's on the same tokens; None where it is beyond a float."""
        return None if self.mean_difference is None else _finite_exp(self.mean_difference)


def paired_difference(
    logprobs: Sequence[float | None], reference: npt.NDArray[np.float64]
) -> PairedDifference:
    """Compare the log-probabilities of tokens with reference NLLs of the same tokens.

    Args:
        logprobs: one per token, None where it was not scored.
        reference: NLLs, NaN where there is none; of the same length.
    """
    nll = -np.array(logprobs, dtype=np.float64)
    both = ~(np.isnan(nll) | np.isnan(reference))
    nll, reference = nll[both], reference[both]
    return PairedDifference(
        len(nll), math.fsum(nll), math.fsum(reference), math.fsum(np.square(nll - reference))
    )


def stderr_between(parts: Iterable[Statistics | PairedDifference]) -> float | None:
    """Return the standard error of the mean NLL, or mean difference, of several texts' tokens together.

    Texts are taken as independent, not their tokens: tokens of one text are alike, so this is the honest
    error of a corpus of many texts. It is the error of a ratio of two sums, values over tokens. None for
    fewer than two texts with tokens.
    """
    sums = [_sum_and_count(part) for part in parts]
    sums = [(value, count) for value, count in sums if count]
    if len(sums) < 2:
        return None
    total = sum(count for _, count in sums)
    mean = math.fsum(value for value, _ in sums) / total
    squares = math.fsum((value - count * mean) ** 2 for value, count in sums)
    return math.sqrt(squares * len(sums) / (len(sums) - 1)) / total


def _sum_and_count(part: Statistics | PairedDifference) -> tuple[float, int]:
    if isinstance(part, Statistics):
        return part.nll_sum, part.num_scored
    return part.nll_sum - part.reference_nll_sum, part.num_paired


@dataclass(frozen=True, slots=True)
class PositionBucket:
    """The scored tokens with `start` to `end - 1` tokens of context before them."""

    start: int
    end: int
    statistics: Statistics


def by_position(scores: Iterable[WindowScores]) -> tuple[PositionBucket, ...]:
    """Return statistics by the number of tokens before the scored one in its window, empty buckets left out.

    Edges are 0, 128, 256, 512, 1024 and so on, doubling.
    """
    buckets: dict[int, list[float]] = {}
    for window_scores in scores:
        window, logprobs = window_scores.window, window_scores.logprobs
        first = window.score_from - window.start
        position = first
        while position < first + len(logprobs):
            number = _bucket(position)
            end = min(_bucket_end(number), first + len(logprobs))
            buckets.setdefault(number, []).extend(logprobs[position - first : end - first])
            position = end
    return tuple(
        PositionBucket(_bucket_end(number - 1) if number else 0, _bucket_end(number), statistics(values))
        for number, values in sorted(buckets.items())
    )


def _bucket(position: int) -> int:
    return max(0, position.bit_length() - 7)


def _bucket_end(number: int) -> int:
    return 128 << number


def _standard_error(count: int, mean: float, square_sum: float) -> float:
    """Return the standard error of a mean of two or more values."""
    variance = max(0.0, square_sum / count - mean**2)
    return math.sqrt(variance / (count - 1))


def _sum_known(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


def _finite_exp(value: float) -> float | None:
    try:
        return math.exp(value)
    except OverflowError:
        return None
