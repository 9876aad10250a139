"""Windows score what their definitions score."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dape_engine.errors import ContextLengthError, RequestError
from dape_engine.request import Window
from dape_engine.scoring import SETTINGS, WindowMode, ladder, window_settings, with_chunk_bos

thorough = settings(derandomize=True, deadline=None, max_examples=200)
tokens = st.integers(2, 90)
lengths = st.integers(2, 40)


def windows(mode: WindowMode, num_tokens: int, **options: Any) -> tuple[Window, ...]:
    return window_settings(mode, num_tokens, **options).windows(num_tokens)


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


@given(st.sampled_from(get_args(WindowMode)), st.integers(3, 90), st.data())
@thorough
def test_no_mode_scores_a_token_twice_or_reads_beyond_its_settings(
    mode: WindowMode, num_tokens: int, data: st.DataObject
) -> None:
    limit = data.draw(st.none() | st.integers(num_tokens if mode == "full" else 3, 90))
    longest = min(limit or 90, num_tokens if mode == "half" else 90)
    length = data.draw(st.none() | st.integers(3, longest))
    drawn = {
        "context_length": length,
        "stride": data.draw(st.none() | st.integers(1, length or min(num_tokens, longest))),
        "score_last": data.draw(st.none() | lengths),
    }
    options = {name: value for name, value in drawn.items() if name in SETTINGS[mode] and value is not None}
    plan_settings = window_settings(mode, num_tokens, **options, max_model_len=limit)
    plan = plan_settings.windows(num_tokens)
    check(plan, num_tokens, plan_settings.context_length)
    found = scored(plan)
    assert found
    assert found == sorted(set(found))
    # What was asked for is what is named; only what the mode reads is named at all.
    named = {"context_length", "stride", "score_last"} & set(SETTINGS[mode]) | {"context_length"}
    for name in ("context_length", "stride", "score_last"):
        assert (getattr(plan_settings, name) is not None) == (name in named)
    for name, value in options.items():
        assert getattr(plan_settings, name) == value
    # Named again, the settings give the same windows.
    again = {name: getattr(plan_settings, name) for name in SETTINGS[mode]}
    assert windows(mode, num_tokens, **again, max_model_len=limit) == plan


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
