"""POST /v1/perplexity: base64 arrays and the paired difference to a reference."""

from __future__ import annotations

import base64
import math
import struct

import numpy as np
import pytest

from fakes import IDS, PERPLEXITY, FakeEngine, check_refused, logprob, score, serving

NLLS = [-logprob(IDS[i - 1], IDS[i], i) for i in range(1, 11)]


@pytest.fixture
def client():
    with serving() as client:
        yield client


def packed(values):
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def test_arrays_come_as_base64_too(client):
    body = {"return_token_logprobs": True, "window": "last", "score_last": 4}
    (lists,) = score(client, **body)["data"]
    (plain,) = score(client, **body, encoding_format="float")["data"]
    (arrays,) = score(client, **body, encoding_format="base64")["data"]
    assert plain == lists
    ids = struct.unpack("<11i", base64.b64decode(arrays.pop("token_ids")))
    values = struct.unpack("<11f", base64.b64decode(arrays.pop("token_logprobs")))
    assert list(ids) == lists.pop("token_ids") == IDS
    expected = lists.pop("token_logprobs")
    assert [math.isnan(value) for value in values] == [value is None for value in expected]
    assert values[-4:] == pytest.approx(expected[-4:], rel=1e-6)
    assert arrays == lists


class TestReference:
    def check(self, difference, pairs, between=...):
        if between is not ...:
            difference = dict(difference)
            found = difference.pop("stderr_between_inputs")
            assert found == (None if between is None else pytest.approx(between))
        deltas = np.array([own - other for own, other in pairs])
        assert difference == {
            "num_paired": len(pairs),
            "nll_sum": pytest.approx(sum(own for own, _ in pairs)),
            "reference_nll_sum": pytest.approx(sum(other for _, other in pairs)),
            "mean_difference": pytest.approx(deltas.mean(), abs=1e-7),
            "stderr": pytest.approx(deltas.std(ddof=1) / math.sqrt(len(deltas)), abs=1e-7),
            "perplexity_ratio": pytest.approx(math.exp(deltas.mean())),
        }

    @pytest.mark.parametrize("form", ["list", "base64"])
    def test_tokens_with_both_values_are_paired(self, client, form):
        other = [None, *(1.5 + i % 3 for i in range(10))]
        other[4] = None
        given = other if form == "list" else packed([math.nan if v is None else v for v in other])
        answer = score(client, reference=[given], window="last", score_last=8)
        pairs = [(NLLS[i - 1], other[i]) for i in range(3, 11) if i != 4]
        (data,) = answer["data"]
        self.check(data["paired_difference"], pairs)
        self.check(answer["corpus"]["paired_difference"], pairs, between=None)
        assert "token_logprobs" not in data

    def test_a_model_differs_from_itself_by_nothing(self, client):
        (data,) = score(client, reference=[[None, *NLLS]])["data"]
        found = data["paired_difference"]
        assert (found["num_paired"], found["mean_difference"], found["stderr"]) == (10, 0, 0)
        assert found["perplexity_ratio"] == 1

    def test_the_corpus_pools_inputs_and_an_input_may_have_none(self, client):
        reference = [[None, *(1.0 for _ in NLLS)], None, [None, 2, 3.5, None]]
        answer = score(client, input=[IDS, IDS[:6], IDS[:4]], reference=reference)
        first, second, third = (data["paired_difference"] for data in answer["data"])
        assert second is None
        short = [(NLLS[0], 2), (NLLS[1], 3.5)]
        self.check(third, short)
        self.check(first, [(value, 1.0) for value in NLLS])
        pairs = [*((value, 1.0) for value in NLLS), *short]
        mean = np.mean([own - other for own, other in pairs])
        squares = ((sum(NLLS) - 10) - 10 * mean) ** 2 + (sum(NLLS[:2]) - 5.5 - 2 * mean) ** 2
        between = math.sqrt(2 * squares) / 12
        self.check(answer["corpus"]["paired_difference"], pairs, between)

    def test_nothing_paired_is_null_and_one_pair_has_no_error(self, client):
        empty = score(client, reference=[[None] * 11])["data"][0]["paired_difference"]
        assert (empty["num_paired"], empty["mean_difference"], empty["perplexity_ratio"]) == (0, None, None)
        one = score(client, reference=[[9.0, 2.0, *[None] * 9]])["data"][0]["paired_difference"]
        assert (one["num_paired"], one["stderr"]) == (1, None)
        assert one["mean_difference"] == pytest.approx(NLLS[0] - 2)

    def test_none_asked_for_none_given(self, client):
        answer = score(client)
        assert "paired_difference" not in answer["data"][0]
        assert "paired_difference" not in answer["corpus"]

    def test_an_added_bos_token_counts(self):
        with serving(FakeEngine(adds_bos=True)) as client:
            body = {"input": "the cat"}
            answer = score(client, **body, reference=[[None, 1.0, 2.0]])
            assert answer["data"][0]["paired_difference"]["num_paired"] == 2
            says = "reference[0]: 2 values for 3 tokens, the added beginning-of-text token included"
            check_refused(client, PERPLEXITY, {**body, "reference": [[1.0, 2.0]]}, "reference", says=says)

    @pytest.mark.parametrize(
        ("reference", "says"),
        [
            ("AAAA", "must be a list with an entry for every input"),
            ([], "expected one entry for each of 1 inputs, got 0"),
            ([None, None], "expected one entry for each of 1 inputs, got 2"),
            ([None] * 129, "129 entries are above the limit of 128"),
            (NLLS, "expected one entry|must be a list of numbers"),
            ([NLLS], "reference[0]: 10 values for 11 tokens"),
            ([[]], "reference[0]: 0 values for 11 tokens"),
            ([packed([1.0])], "reference[0]: 1 values for 11 tokens"),
            ([[None, *(-value for value in NLLS)]], "change the sign of log-probabilities"),
            ([[None, "1", *NLLS[1:]]], "reference[0]: must be a list of numbers and null"),
            ([[True, *NLLS]], "reference[0]: must be a list of numbers and null"),
            ([{"a": 1}], "reference[0]: must be a list of numbers and null"),
            ([[[1.0]]], "reference[0]: must be a list of numbers and null"),
            (["?" * 16], "reference[0]: is not base64"),
            (["AAAAAA=="], "reference[0]: holds 4 bytes|1 values"),
            (["AAAAAAA="], "reference[0]: holds 5 bytes, no multiple of 4"),
            ([packed([math.inf] * 11)], "reference[0]: holds an infinite value"),
            ([[10**400] * 11], "reference[0]: holds a number beyond a float"),
        ],
    )
    def test_what_is_no_reference_is_refused(self, client, reference, says):
        body = {"input": IDS, "reference": reference}
        answer = client.post(PERPLEXITY, json=body)
        message = answer.json()["error"]["message"]
        assert any(part in message for part in says.split("|")), message
        check_refused(client, PERPLEXITY, body, "reference")


@pytest.mark.parametrize("value", ["base64", "float16", "", 1, ["float"]])
def test_an_encoding_without_arrays_or_of_another_name_is_refused(client, value):
    check_refused(client, PERPLEXITY, {"input": IDS, "encoding_format": value}, "encoding_format")
