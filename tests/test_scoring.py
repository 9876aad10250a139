"""Windows score what their definitions score, and statistics agree with plain formulas."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dape_engine.errors import ContextLengthError, RequestError, StepError
from dape_engine.request import Window, WindowScores
from dape_engine.scoring import (
    Statistics,
    by_position,
    ladder,
    statistics,
    windows,
    with_chunk_bos,
)

thorough = settings(derandomize=True, deadline=None, max_examples=200)
tokens = st.integers(2, 90)
lengths = st.integers(2, 40)


def scored(plan: tuple[Window, ...]) -> list[int]:
    return [token for window in plan for token in range(window.score_from, window.end)]


def check(plan: tuple[Window, ...], num_tokens: int, length: int) -> None:
    for window in plan:
        assert 0 <= window.start < window.score_from < window.end <= num_tokens
        assert window.end - window.start <= length


@pytest.mark.parametrize(
    ("mode", "num_tokens", "options", "expected"),
    [
        ("full", 7, {}, [(0, 7, 1)]),
        ("full", 2, {"max_model_len": 2}, [(0, 2, 1)]),
        ("sliding", 10, {"context_length": 4, "stride": 2}, [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]),
        ("sliding", 9, {"context_length": 4, "stride": 3}, [(0, 4, 1), (3, 7, 4), (6, 9, 7)]),
        ("sliding", 9, {"context_length": 4, "stride": 4}, [(0, 4, 1), (4, 8, 5)]),
        ("sliding", 9, {"context_length": 4}, [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 9, 8)]),
        ("sliding", 3, {"context_length": 8, "stride": 1}, [(0, 3, 1)]),
        ("disjoint", 11, {"context_length": 5}, [(0, 5, 1), (4, 9, 5), (6, 11, 9)]),
        ("disjoint", 9, {"context_length": 5}, [(0, 5, 1), (4, 9, 5)]),
        ("disjoint", 4, {"context_length": 5}, [(0, 4, 1)]),
        ("disjoint", 4, {"context_length": 2}, [(0, 2, 1), (1, 3, 2), (2, 4, 3)]),
        ("disjoint", 9, {"max_model_len": 5}, [(0, 5, 1), (4, 9, 5)]),
        ("half", 17, {"context_length": 8}, [(0, 8, 5), (8, 16, 13)]),
        ("half", 7, {"context_length": 3}, [(0, 3, 2), (3, 6, 5)]),
        ("last", 20, {"context_length": 8, "score_last": 3}, [(12, 20, 17)]),
        ("last", 20, {"context_length": 8}, [(12, 20, 13)]),
        ("last", 5, {"context_length": 8, "score_last": 3}, [(0, 5, 2)]),
        ("last", 1000, {}, [(0, 1000, 744)]),
        ("last", 1000, {"max_model_len": 600}, [(400, 1000, 744)]),
    ],
)
def test_windows_worked_by_hand(
    mode: Any, num_tokens: int, options: dict[str, int], expected: list[tuple[int, int, int]]
) -> None:
    assert [astuple(window) for window in windows(mode, num_tokens, **options)] == expected


@given(tokens, lengths, st.data())
@thorough
def test_sliding_windows_score_what_the_masked_labels_of_the_guide_score(
    num_tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    plan = windows("sliding", num_tokens, context_length=length, stride=stride)
    check(plan, num_tokens, length)
    expected: list[int] = []
    previous_end = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        labels = np.arange(begin, end)
        labels[: len(labels) - (end - previous_end)] = -100
        expected += [label for label in labels[1:].tolist() if label != -100]
        previous_end = end
        if end == num_tokens:
            break
    assert scored(plan) == expected
    if stride < length:
        assert expected == list(range(1, num_tokens))


@given(tokens, lengths)
@thorough
def test_disjoint_windows_score_every_token_but_the_first_once(num_tokens: int, length: int) -> None:
    plan = windows("disjoint", num_tokens, context_length=length)
    check(plan, num_tokens, length)
    assert scored(plan) == list(range(1, num_tokens))
    for window in plan[1:-1]:
        assert window.score_from == window.start + 1
    # The last window takes all the context it may, as lm-eval's does.
    assert plan[-1].end - plan[-1].start == min(length, num_tokens)


@given(tokens, st.integers(3, 40))
@thorough
def test_half_windows_score_the_second_half_of_complete_chunks(num_tokens: int, length: int) -> None:
    if num_tokens < length:
        with pytest.raises(RequestError, match=f"needs at least context_length {length}"):
            windows("half", num_tokens, context_length=length)
        return
    plan = windows("half", num_tokens, context_length=length)
    check(plan, num_tokens, length)
    # llama.cpp: outputs from place length / 2 on, but the last one, each for the token after it.
    outputs = range(length // 2, length - 1)
    chunks = range(num_tokens // length)
    assert scored(plan) == [chunk * length + output + 1 for chunk in chunks for output in outputs]


def test_chunks_begin_with_bos_where_the_model_has_one() -> None:
    chunks = windows("half", 7, context_length=3)
    text = tuple(range(10, 17))
    assert with_chunk_bos(text, chunks, 1) == (1, 11, 12, 1, 14, 15, 16)
    assert with_chunk_bos(text, chunks, None) == text


@pytest.mark.parametrize(
    ("mode", "num_tokens", "options", "param", "message"),
    [
        ("full", 0, {}, "input", "0 token.* at least 2"),
        ("full", 1, {}, "input", "1 token.* at least 2"),
        ("sliding", 9, {"context_length": 1}, "context_length", "at least 2, got 1"),
        ("half", 9, {"context_length": 2}, "context_length", "at least 3, got 2"),
        ("half", 2, {}, "input", "2 tokens, .* 3"),
        ("disjoint", 9, {"context_length": 9, "max_model_len": 8}, "context_length", r"\(8\), got 9"),
        ("sliding", 9, {"context_length": 4, "stride": 0}, "stride", "at least 1, got 0"),
        ("sliding", 9, {"context_length": 4, "stride": -3}, "stride", "at least 1, got -3"),
        ("sliding", 9, {"context_length": 4, "stride": 5}, "stride", r"context_length \(4\), got 5"),
        ("last", 9, {"score_last": 0}, "score_last", "at least 1, got 0"),
        ("full", 9, {"stride": 2}, "stride", "no meaning with window 'full'"),
        ("full", 9, {"context_length": 4}, "context_length", "no meaning"),
        ("disjoint", 9, {"score_last": 4}, "score_last", "no meaning"),
    ],
)
def test_settings_out_of_range_are_refused(
    mode: Any, num_tokens: int, options: dict[str, int], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        windows(mode, num_tokens, **options)
    assert caught.value.param == param


def test_a_full_window_that_the_model_cannot_read_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="9 tokens, above max_model_len 8"):
        windows("full", 9, max_model_len=8)


rungs = st.lists(st.integers(2, 60), min_size=1, max_size=5)


@given(rungs, st.integers(1, 30), st.integers(60, 80))
@thorough
def test_a_prefix_ladder_reads_once_and_a_suffix_ladder_once_a_length(
    lengths: list[int], score_last: int, num_tokens: int
) -> None:
    for kind in ("prefix", "suffix"):
        plan = ladder(kind, num_tokens, lengths, score_last=score_last)
        check(plan.windows, num_tokens, max(lengths))
        assert len(plan.windows) == (1 if kind == "prefix" else len(lengths))
        assert [rung.length for rung in plan.rungs] == lengths
        for rung in plan.rungs:
            window = plan.windows[rung.window]
            end = rung.length if kind == "prefix" else num_tokens
            count = min(score_last, rung.length - 1)
            assert scored((window,))[rung.first : rung.last] == list(range(end - count, end))
            assert window.start == (0 if kind == "prefix" else num_tokens - rung.length)


@pytest.mark.parametrize("kind", ["prefix", "suffix"])
@pytest.mark.parametrize(
    ("lengths", "options", "param", "message"),
    [
        ([], {}, "lengths", "empty"),
        ([128, 1], {}, "lengths", "at least 2, got 1"),
        ([128, 301], {}, "lengths", r"number of input tokens \(300\), got 301"),
        ([128, 300], {"max_model_len": 256}, "lengths", r"max_model_len \(256\), got 300"),
        ([128], {"score_last": 0}, "score_last", "at least 1, got 0"),
    ],
)
def test_ladders_out_of_range_are_refused(
    kind: Any, lengths: list[int], options: dict[str, int], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ladder(kind, 300, lengths, **options)
    assert caught.value.param == param


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
