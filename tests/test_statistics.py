"""Statistics agree with plain formulas."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dape_engine.errors import StepError
from dape_engine.request import Window, WindowScores
from dape_engine.statistics import (
    PairedDifference,
    Statistics,
    by_position,
    paired_difference,
    statistics,
    stderr_between,
)

thorough = settings(derandomize=True, deadline=None, max_examples=200)
logprob_lists = st.lists(st.floats(-30, 0, width=32), max_size=50)


@given(logprob_lists)
@thorough
def test_statistics_agree_with_the_plain_formulas(logprobs: list[float]) -> None:
    result = statistics(logprobs, num_bytes=3 * len(logprobs))
    nll = -np.array(logprobs)
    assert result.num_scored == len(logprobs)
    assert result.nll_sum == pytest.approx(nll.sum(), abs=1e-9)
    if not logprobs:
        assert result.mean_nll is result.perplexity is result.perplexity_stderr is None
        assert result.bits_per_byte is None
        return
    assert result.mean_nll == pytest.approx(nll.mean(), abs=1e-12)
    assert result.perplexity == pytest.approx(np.exp(nll.mean()))
    assert result.bits_per_byte == pytest.approx(np.log2(np.exp(nll)).sum() / (3 * len(logprobs)), abs=1e-12)
    if len(logprobs) == 1:
        assert result.perplexity_stderr is None
    else:
        perplexity = np.exp(nll.mean())
        error = perplexity * nll.std(ddof=1) / math.sqrt(len(nll))
        assert result.perplexity_stderr == pytest.approx(error, rel=1e-6, abs=1e-5 * perplexity)


def test_sums_do_not_drift() -> None:
    assert statistics([-0.1] * 10).nll_sum == 1.0


@given(logprob_lists, logprob_lists)
@thorough
def test_totals_are_those_of_all_tokens_together(first: list[float], second: list[float]) -> None:
    total = statistics(first, 5) + statistics(second, 7)
    whole = statistics([*first, *second], 12)
    assert astuple(total) == pytest.approx(astuple(whole))
    assert Statistics() + whole == whole
    assert (statistics(first, None) + whole).num_bytes is None


def test_a_corpus_is_not_the_mean_of_its_texts() -> None:
    easy, hard = statistics([-1.0] * 99), statistics([-10.0])
    assert (easy + hard).perplexity == pytest.approx(math.exp(1.09))


def test_what_no_float_can_hold_is_none_and_never_infinite() -> None:
    result = statistics([-1000.0, -1001.0], 4)
    assert (result.perplexity, result.perplexity_stderr) == (None, None)
    assert statistics([0.0, -1419.0]).perplexity_stderr is None
    values = (result.mean_nll, result.perplexity, result.perplexity_stderr, result.bits_per_byte)
    json.dumps([*astuple(result), *values], allow_nan=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(StepError, match="not finite"):
        statistics([-1.0, bad])


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 900), st.integers(1, 900)), max_size=4))
@settings(thorough, max_examples=40)
def test_buckets_hold_each_token_by_the_context_it_had(shapes: list[tuple[int, int, int]]) -> None:
    scores = []
    for start, context, count in shapes:
        window = Window(start, start + context + count, start + context)
        scores.append(WindowScores(window, tuple(-(0.5 + i % 7) for i in range(count))))
    edges = [0, 128, 256, 512, 1024, 2048]
    buckets = by_position(scores)
    assert [(b.start, b.end) for b in buckets] == sorted({(b.start, b.end) for b in buckets})
    found = {(bucket.start, bucket.end): bucket.statistics for bucket in buckets}
    for start, end in pairwise(edges):
        expected = [
            logprob
            for one in scores
            for token, logprob in enumerate(one.logprobs, one.window.score_from)
            if start <= token - one.window.start < end
        ]
        assert found.get((start, end), Statistics(num_bytes=None)) == statistics(expected)
    assert sum(bucket.statistics.num_scored for bucket in buckets) == sum(len(s.logprobs) for s in scores)


@given(st.lists(st.tuples(st.integers(0, 600), logprob_lists), min_size=1, max_size=6))
@settings(thorough, max_examples=60)
def test_the_parts_of_a_text_add_up_to_the_whole(parts: list[tuple[int, list[float]]]) -> None:
    windows = [
        WindowScores(Window(0, place + 1 + len(logprobs), place + 1), tuple(logprobs))
        for place, logprobs in parts
    ]
    whole = statistics([logprob for _, logprobs in parts for logprob in logprobs])
    for sums in (
        sum((statistics(window.logprobs) for window in windows), Statistics()),
        sum((bucket.statistics for bucket in by_position(windows)), Statistics()),
    ):
        assert sums.num_scored == whole.num_scored
        assert sums.nll_sum == pytest.approx(whole.nll_sum)
        assert sums.nll_square_sum == pytest.approx(whole.nll_square_sum)


pairs = st.lists(st.tuples(st.none() | st.floats(-30, 0), st.none() | st.floats(0, 30)), max_size=40)


@given(pairs)
@thorough
def test_a_paired_difference_is_that_of_the_tokens_with_both(tokens: list[tuple[float, float]]) -> None:
    logprobs = [logprob for logprob, _ in tokens]
    reference = np.array([math.nan if nll is None else nll for _, nll in tokens])
    found = paired_difference(logprobs, reference)
    both = [(-logprob, nll) for logprob, nll in tokens if logprob is not None and nll is not None]
    assert found.num_paired == len(both)
    if not both:
        assert found.mean_difference is found.stderr is found.perplexity_ratio is None
        return
    deltas = np.array([own - other for own, other in both])
    assert found.mean_difference == pytest.approx(deltas.mean(), abs=1e-9)
    assert found.perplexity_ratio == pytest.approx(np.exp(deltas.mean()))
    if len(both) == 1:
        assert found.stderr is None
    else:
        assert found.stderr == pytest.approx(deltas.std(ddof=1) / math.sqrt(len(deltas)), abs=1e-6)


@given(pairs, pairs)
@thorough
def test_paired_differences_add_up(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> None:
    def difference(tokens: list[tuple[float, float]]) -> PairedDifference:
        reference = [math.nan if nll is None else nll for _, nll in tokens]
        return paired_difference([logprob for logprob, _ in tokens], np.array(reference, dtype=float))

    total = difference(first) + difference(second)
    assert astuple(total) == pytest.approx(astuple(difference(first + second)))


def test_a_paired_difference_is_surer_than_two_perplexities() -> None:
    hard = np.random.default_rng(0).exponential(2, 1000)
    better = hard - 0.02
    difference = paired_difference((-better).tolist(), hard)
    assert difference.mean_difference == pytest.approx(-0.02)
    assert difference.stderr == pytest.approx(0, abs=1e-6)
    plain = statistics((-hard).tolist())
    assert plain.perplexity_stderr is not None
    assert plain.perplexity_stderr / plain.perplexity > 0.05  # type: ignore[operator]


def test_texts_that_differ_make_a_greater_error_than_their_tokens_do() -> None:
    alike = [statistics([-1.0, -3.0] * 50) for _ in range(10)]
    assert stderr_between(alike) == pytest.approx(0, abs=1e-9)
    unlike = [statistics([-1.0 - text % 2 * 2] * 100) for text in range(10)]
    # Ten texts whose means are 1 or 3 nats: the error of a mean of ten such numbers.
    expected = np.std([1, 3] * 5, ddof=1) / math.sqrt(10)
    assert stderr_between(unlike) == pytest.approx(expected)
    assert stderr_between([*unlike, Statistics()]) == pytest.approx(expected)
    assert stderr_between(unlike[:1]) is stderr_between([]) is None
    differences = [PairedDifference(100, text % 2 * 200.0 + 500, 500) for text in range(10)]
    assert stderr_between(differences) == pytest.approx(expected)
    whole = sum(unlike, Statistics())
    assert whole.perplexity_error(expected) == pytest.approx(math.exp(2) * expected)
    assert whole.perplexity_error(None) is statistics([-1000.0]).perplexity_error(1.0) is None


def test_longer_texts_weigh_more_in_the_error_between_texts() -> None:
    sums, counts = np.array([30.0, 500.0, 90.0]), np.array([10, 100, 40])
    texts = [Statistics(int(count), float(value)) for value, count in zip(sums, counts, strict=True)]
    mean = sums.sum() / counts.sum()
    # The ratio estimator's variance, with mean count in the denominator.
    variance = ((sums - mean * counts) ** 2).sum() / 2 / 3 / counts.mean() ** 2
    assert stderr_between(texts) == pytest.approx(math.sqrt(variance))
