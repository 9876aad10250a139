"""Whatever is asked for, an answer of POST /v1/perplexity adds up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from fakes import BOS, PERPLEXITY, FakeEngine, logprob, serving

inputs = st.lists(st.lists(st.integers(2, 260), min_size=8, max_size=40), min_size=1, max_size=4)
length = st.integers(3, 8)
asked = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"window": st.just("sliding"), "context_length": length, "stride": st.integers(1, 3)}
    ),
    st.fixed_dictionaries({"window": st.sampled_from(["disjoint", "half"]), "context_length": length}),
    st.fixed_dictionaries({"window": st.just("last"), "score_last": st.integers(1, 50)}),
)
beginnings = st.sampled_from(["auto", "always", "never", BOS, 9])
ladders = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"lengths": st.lists(st.integers(2, 8), min_size=1), "ladder": st.sampled_from(["prefix", "suffix"])}
    ),
)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with serving(FakeEngine(max_model_len=64)) as client:
        yield client


@given(inputs, asked, beginnings, ladders)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_parts_add_up_to_the_whole(
    client: TestClient, ids: list[list[int]], window: dict[str, Any], bos: str | int, ladder: dict[str, Any]
) -> None:
    body = {"input": ids, "bos": bos, **window, **({} if window.get("window") == "half" else ladder)}
    answer = client.post(PERPLEXITY, json={**body, "return_token_logprobs": True})
    assert answer.status_code == 200, answer.text
    data, corpus = answer.json()["data"], answer.json()["corpus"]
    for given_ids, part in zip(ids, data, strict=True):
        read = part["token_ids"]
        assert read[len(read) - len(given_ids) :] == given_ids
        assert part["bos"]["added"] == (len(read) > len(given_ids))
        check_windows(part)
        check_scores(part)
        check_sums(part)
        first = 0 if part["bos"]["token_id"] is None else 1
        assert part["bos"]["first_token_scored"] == (part["token_logprobs"][first] is not None)
        assert [rung["length"] for rung in part["ladder"]] == body.get("lengths", [])
    for key in ("num_tokens", "num_scored", "num_bytes"):
        assert corpus[key] == sum(part[key] for part in data)
    assert corpus["nll_sum"] == pytest.approx(sum(part["nll_sum"] for part in data))
    check_sums(corpus)
    for place, rung in enumerate(corpus["ladder"]):
        same = [part["ladder"][place] for part in data]
        assert rung["num_scored"] == sum(one["num_scored"] for one in same)
        assert rung["nll_sum"] == pytest.approx(sum(one["nll_sum"] for one in same))
    assert (corpus["stderr_between_inputs"] is None) == (len(ids) == 1)
    assert answer.json()["usage"]["prompt_tokens"] == corpus["num_tokens"]


def check_windows(part: dict[str, Any]) -> None:
    scored: list[int] = []
    for window in part["windows"]:
        start, end, score_from = window["start"], window["end"], window["score_from"]
        assert 0 <= start < score_from < end <= part["num_tokens"]
        assert end - start <= part["window"]["context_length"]
        assert window["num_scored"] == end - score_from
        scored += range(score_from, end)
    assert scored == sorted(set(scored))
    found = [place for place, value in enumerate(part["token_logprobs"]) if value is not None]
    assert found == scored
    assert part["num_scored"] == len(scored)


def check_scores(part: dict[str, Any]) -> None:
    """Each token's score is that after the tokens which its window holds before it."""
    ids = part["token_ids"]
    for window in part["windows"]:
        start = window["start"]
        for place in range(window["score_from"], window["end"]):
            before = ids[place - 1]
            if part["window"]["mode"] == "half" and place - 1 == start and ids[0] == part["bos"]["token_id"]:
                before = ids[0]
            assert part["token_logprobs"][place] == logprob(before, ids[place], place - start)
    values = [value for value in part["token_logprobs"] if value is not None]
    assert part["nll_sum"] == pytest.approx(-math.fsum(values))


def check_sums(totals: dict[str, Any]) -> None:
    assert totals["perplexity"] == pytest.approx(math.exp(totals["nll_sum"] / totals["num_scored"]))
    buckets = totals["by_position"]
    assert sum(bucket["num_scored"] for bucket in buckets) == totals["num_scored"]
    assert sum(bucket["nll_sum"] for bucket in buckets) == pytest.approx(totals["nll_sum"])
