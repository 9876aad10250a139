"""POST /v1/perplexity against sums written out by hand over the fake engine's log-probabilities."""

from __future__ import annotations

import math
import re

import pytest

from fakes import BOS, EOS, IDS, PERPLEXITY, FakeEngine, check_refused, logprob, score, serving


@pytest.fixture
def client():
    with serving() as client:
        yield client


def nll(start, score_from, end, ids=IDS):
    """Return the negative log-likelihood of ids[score_from:end], read from `start` on."""
    return -math.fsum(logprob(ids[place - 1], ids[place], place - start) for place in range(score_from, end))


def test_full_window_is_the_default(client):
    answer = score(client)
    assert answer.pop("id").startswith("ppl-")
    assert answer.pop("created") > 1_700_000_000
    total = nll(0, 1, 11)
    squares = math.fsum(nll(0, i, i + 1) ** 2 for i in range(1, 11))
    size = len(client.post("/detokenize", json={"tokens": IDS[1:]}).json()["prompt"].encode())
    error = math.exp(total / 10) * math.sqrt((squares / 10 - (total / 10) ** 2) / 9)
    statistics = {
        "num_tokens": 11,
        "num_scored": 10,
        "nll_sum": pytest.approx(total),
        "mean_nll": pytest.approx(total / 10),
        "perplexity": pytest.approx(math.exp(total / 10)),
        "stderr": pytest.approx(error),
        "num_bytes": size,
        "bits_per_byte": pytest.approx(total / math.log(2) / size),
        "num_words": None,
        "word_perplexity": None,
        "by_position": [
            {
                "from": 0,
                "to": 128,
                "num_scored": 10,
                "nll_sum": pytest.approx(total),
                "perplexity": pytest.approx(math.exp(total / 10)),
                "stderr": pytest.approx(error),
            }
        ],
        "ladder": [],
    }
    assert answer == {
        "object": "perplexity",
        "model": "fake",
        "data": [
            {
                "index": 0,
                **statistics,
                "bos": {"rule": "auto", "added": False, "token_id": None, "first_token_scored": False},
                "window": {"mode": "full", "context_length": 11, "stride": None, "score_last": None},
                "windows": [{"start": 0, "end": 11, "score_from": 1, "num_scored": 10}],
            }
        ],
        "corpus": {**statistics, "stderr_between_inputs": None},
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 0,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 0, "read_tokens": 11},
        },
    }


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"window": "full"}, [(0, 1, 11)]),
        (
            {"window": "sliding", "context_length": 4},
            [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10), (8, 10, 11)],
        ),
        ({"window": "sliding", "context_length": 6, "stride": 5}, [(0, 1, 6), (5, 6, 11)]),
        ({"window": "disjoint", "context_length": 6}, [(0, 1, 6), (5, 6, 11)]),
        ({"window": "half", "context_length": 5}, [(0, 3, 5), (5, 8, 10)]),
        ({"window": "last", "score_last": 3}, [(0, 8, 11)]),
        ({"window": "last", "context_length": 5, "score_last": 3}, [(6, 8, 11)]),
    ],
    ids=lambda value: value["window"] if isinstance(value, dict) else "",
)
def test_windows_are_scored_and_repeated_back(client, settings, windows):
    (data,) = score(client, **settings, return_token_logprobs=True)["data"]
    assert data["windows"] == [
        {"start": s, "end": e, "score_from": f, "num_scored": e - f} for s, f, e in windows
    ]
    assert data["nll_sum"] == pytest.approx(sum(nll(*window) for window in windows))
    expected = [None] * len(IDS)
    for start, score_from, end in windows:
        for place in range(score_from, end):
            expected[place] = logprob(IDS[place - 1], IDS[place], place - start)
    assert data["token_logprobs"] == expected
    assert data["token_ids"] == IDS
    assert data["num_scored"] == sum(value is not None for value in expected)


def test_numbers_equal_those_of_a_completion_with_echo(client):
    (data,) = score(client, return_token_logprobs=True, top_logprobs=2)["data"]
    body = {"prompt": IDS, "echo": True, "logprobs": 2, "max_tokens": 0}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert data["token_logprobs"] == choice["logprobs"]["token_logprobs"]
    assert data["top_logprobs"] == choice["logprobs"]["top_logprobs"]


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({"window": "full"}, ("full", 11, None, None)),
        ({"window": "sliding"}, ("sliding", 11, 5, None)),
        ({"window": "sliding", "context_length": 20, "stride": 3}, ("sliding", 20, 3, None)),
        ({"window": "disjoint", "context_length": 6}, ("disjoint", 6, None, None)),
        ({"window": "half"}, ("half", 11, None, None)),
        ({"window": "last", "context_length": 5}, ("last", 5, None, 256)),
        ({"window": "last", "score_last": 2}, ("last", 11, None, 2)),
    ],
)
def test_the_answer_names_the_window_with_its_defaults(client, settings, used):
    (data,) = score(client, **settings)["data"]
    assert tuple(data["window"].values()) == used


class TestLadder:
    def test_prefixes_are_read_in_one_pass(self, client):
        (data,) = score(client, lengths=[4, 11, 2, 7], score_last=3)["data"]
        expected = {4: (1, 4), 11: (8, 11), 2: (1, 2), 7: (4, 7)}
        assert [rung["length"] for rung in data["ladder"]] == [4, 11, 2, 7]
        for rung in data["ladder"]:
            first, end = expected[rung["length"]]
            assert rung["num_scored"] == end - first
            assert rung["nll_sum"] == pytest.approx(nll(0, first, end))
            assert rung["perplexity"] == pytest.approx(math.exp(nll(0, first, end) / (end - first)))
        assert data["num_scored"] == 10
        assert [len(request.windows) for request in client.engine.requests] == [1]

    def test_suffixes_score_the_same_tokens_with_growing_context(self, client):
        (data,) = score(client, lengths=[4, 8, 11], ladder="suffix", score_last=3)["data"]
        assert [rung["nll_sum"] for rung in data["ladder"]] == pytest.approx(
            [nll(11 - length, 8, 11) for length in (4, 8, 11)]
        )
        assert {rung["num_scored"] for rung in data["ladder"]} == {3}
        # The greatest length is part of the full pass.
        assert [len(request.windows) for request in client.engine.requests] == [3]

    def test_stands_beside_any_window(self, client):
        settings = {"window": "sliding", "context_length": 4, "lengths": [5], "score_last": 2}
        for kind, window in (("prefix", (0, 3, 5)), ("suffix", (6, 9, 11))):
            (data,) = score(client, **settings, ladder=kind)["data"]
            assert data["ladder"][0]["nll_sum"] == pytest.approx(nll(*window))
            assert len(data["windows"]) == 5
            assert data["num_scored"] == 10

    @pytest.mark.parametrize(("kind", "window"), [("prefix", (0, 5, 8)), ("suffix", (3, 8, 11))])
    def test_input_longer_than_the_model_has_the_greatest_length_as_its_own(self, kind, window):
        with serving(FakeEngine(max_model_len=8)) as client:
            (data,) = score(client, lengths=[4, 8], ladder=kind, score_last=3)["data"]
        assert data["num_scored"] == 3
        assert data["nll_sum"] == data["ladder"][1]["nll_sum"] == pytest.approx(nll(*window))
        mode = {"prefix": "prefix", "suffix": "last"}[kind]
        assert tuple(data["window"].values()) == (mode, 8, None, 3)
        assert data["num_tokens"] == 11

    def test_asked_for_full_window_must_fit(self):
        with serving(FakeEngine(max_model_len=8)) as client:
            answer = client.post(PERPLEXITY, json={"input": IDS, "lengths": [4], "window": "full"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "input"


def test_corpus_sums_over_inputs(client):
    other = [70, 71, 72, 73]
    answer = score(client, input=[IDS, other], lengths=[4, 2], score_last=3)
    first, second = answer["data"]
    corpus = answer["corpus"]
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert corpus["num_tokens"] == 15
    assert corpus["num_scored"] == 13
    assert corpus["nll_sum"] == pytest.approx(nll(0, 1, 11) + nll(0, 1, 4, other))
    assert corpus["perplexity"] == pytest.approx(math.exp(corpus["nll_sum"] / 13))
    for rung, one, two in zip(corpus["ladder"], first["ladder"], second["ladder"], strict=True):
        assert rung["nll_sum"] == pytest.approx(one["nll_sum"] + two["nll_sum"])
        assert rung["num_scored"] == one["num_scored"] + two["num_scored"]
    assert answer["usage"]["prompt_tokens"] == 15
    (bucket,) = corpus["by_position"]
    assert (bucket["num_scored"], bucket["nll_sum"]) == (13, pytest.approx(corpus["nll_sum"]))
    # The error of a ratio of sums: inputs, not tokens, are what is drawn.
    mean = corpus["nll_sum"] / 13
    squares = sum((item["nll_sum"] - item["num_scored"] * mean) ** 2 for item in (first, second))
    assert corpus["stderr_between_inputs"] == pytest.approx(math.exp(mean) * math.sqrt(2 * squares) / 13)


class TestBos:
    @pytest.mark.parametrize(
        ("adds", "bos", "given", "read"),
        [
            (True, "auto", "the cat", [BOS, 259, 264]),
            (False, "auto", "the cat", [259, 264]),
            (True, "never", "the cat", [259, 264]),
            (True, "always", "the cat", [BOS, 259, 264]),
            (False, "always", "the cat", [BOS, 259, 264]),
            (False, "always", "<s>the cat", [BOS, 259, 264]),
            (True, "auto", [259, 264], [259, 264]),
            (True, "never", [259, 264], [259, 264]),
            (False, "always", [259, 264], [BOS, 259, 264]),
            (False, "always", [BOS, 259, 264], [BOS, 259, 264]),
            (True, "auto", "<s>the cat", [BOS, 259, 264]),
            (True, BOS, "the cat", [BOS, 259, 264]),
            (False, BOS, [259, 264], [BOS, 259, 264]),
            (False, BOS, [BOS, 259, 264], [BOS, 259, 264]),
        ],
    )
    def test_rule(self, adds, bos, given, read):
        with serving(FakeEngine(adds_bos=adds)) as client:
            (data,) = score(client, input=given, bos=bos, return_token_logprobs=True)["data"]
        assert data["token_ids"] == read
        assert data["num_tokens"] == len(read)
        begins = read[0] == BOS
        assert data["bos"] == {
            "rule": bos,
            "added": begins and not (given[0] == BOS or "<s>" in given),
            "token_id": BOS if begins else None,
            "first_token_scored": begins,
        }

    def test_any_token_may_take_its_place(self, client):
        with serving(FakeEngine(adds_bos=True)) as client:
            (data,) = score(client, input="the cat", bos=EOS, return_token_logprobs=True)["data"]
        assert data["token_ids"] == [EOS, 259, 264]
        assert data["bos"] == {"rule": EOS, "added": True, "token_id": EOS, "first_token_scored": True}

    @pytest.mark.parametrize("bos", [-1, 1 << 40, 300, True, 1.0, "sometimes", [1], {}])
    def test_what_is_no_rule_is_refused(self, client, bos):
        check_refused(client, PERPLEXITY, {"input": IDS, "bos": bos}, "bos", says="bos")

    def test_a_first_token_outside_the_scored_ones_is_told(self, client):
        (data,) = score(client, input=[BOS, *IDS], window="last", score_last=2)["data"]
        assert data["bos"] == {"rule": "auto", "added": False, "token_id": BOS, "first_token_scored": False}

    def test_model_without_bos(self, client):
        client.engine.config = client.engine.config.model_copy(update={"bos_token_id": None})
        answer = client.post(PERPLEXITY, json={"input": IDS, "bos": "always"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "bos"

    def test_half_windows_each_begin_with_it(self, client):
        ids = [BOS, *IDS[1:]]
        (data,) = score(client, input=ids, window="half", context_length=5, return_token_logprobs=True)[
            "data"
        ]
        (request,) = client.engine.requests
        assert request.token_ids == (BOS, *ids[1:5], BOS, *ids[6:])
        assert data["token_ids"] == ids


def test_long_inputs_slide_without_limit_of_the_model():
    with serving(FakeEngine(max_model_len=8)) as client:
        answer = score(client, input="the cat on " * 50, window="sliding", context_length=8)
        assert answer["data"][0]["num_scored"] == answer["data"][0]["num_tokens"] - 1
        refused = client.post(PERPLEXITY, json={"input": "the cat on " * 50})
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"


class TestWords:
    """Words and bytes as lm-eval counts them, where all of a text is scored."""

    @pytest.mark.parametrize(
        ("text", "words"), [("the cat", 2), ("the", 1), (" the  cat\n", 4), ("the\u2003cat on\tthe", 4)]
    )
    def test_are_counted_where_every_token_is_scored(self, client, text, words):
        (data,) = score(client, input=text, bos="always")["data"]
        assert data["num_words"] == words == len(re.split(r"\s+", text))
        assert data["word_perplexity"] == pytest.approx(math.exp(data["nll_sum"] / words))
        assert data["num_bytes"] == len(text.encode())

    @pytest.mark.parametrize(
        "settings",
        [
            {"input": "the cat on"},
            {"input": [BOS, 259, 264], "bos": "always"},
            {"input": "the cat on the cat", "bos": "always", "window": "last", "score_last": 2},
        ],
        ids=["the first token has no context", "ids are no text", "a part is scored"],
    )
    def test_are_unknown_otherwise(self, client, settings):
        answer = score(client, **settings)
        for part in (*answer["data"], answer["corpus"]):
            assert (part["num_words"], part["word_perplexity"]) == (None, None)

    def test_add_up_over_inputs(self, client):
        corpus = score(client, input=["the cat", "the"], bos="always")["corpus"]
        assert corpus["num_words"] == 3
        assert corpus["word_perplexity"] == pytest.approx(math.exp(corpus["nll_sum"] / 3))
        partly = score(client, input=["the cat", "<s>the cat"])
        assert [part["num_words"] for part in partly["data"]] == [None, 2]
        assert partly["corpus"]["num_words"] is None
