"""POST /v1/perplexity at work: progress with partial sums, the queue, limits and their messages."""

from __future__ import annotations

import math
import time

import pytest

from dape_engine.errors import QueueFullError
from dape_engine.request import BACKGROUND
from dape_server import limits
from dape_server.scores import plan, run
from fakes import (
    CANARY,
    COMPLETIONS,
    IDS,
    PERPLEXITY,
    FakeEngine,
    check_refused,
    events,
    logprob,
    score,
    serving,
)


@pytest.fixture
def client():
    with serving() as client:
        yield client


class TestProgress:
    BODY = {"input": [IDS, IDS[:6]], "window": "sliding", "context_length": 4, "stream": True}

    def test_reports_each_window_then_the_answer(self, client):
        *progress, final = events(client.post(PERPLEXITY, json=self.BODY).text)
        assert {event["object"] for event in progress} == {"perplexity.progress"}
        assert {event["id"] for event in (*progress, final)} == {final["id"]}
        assert [event["windows_done"] for event in progress] == [1, 2, 3, 4, 5, 6, 7]
        assert {event["windows_total"] for event in progress} == {7}
        assert {event["tokens_total"] for event in progress} == {4 * 4 + 3 + 2 * 4}
        assert progress[-1]["tokens_done"] == final["usage"]["prompt_tokens_details"]["read_tokens"] == 27
        assert sum(event["num_scored"] for event in progress) == final["corpus"]["num_scored"] == 15
        assert sum(event["nll_sum"] for event in progress) == pytest.approx(final["corpus"]["nll_sum"])
        for index in (0, 1):
            shown = [event["window"] for event in progress if event["index"] == index]
            assert shown == final["data"][index]["windows"]
        plain = client.post(PERPLEXITY, json={**self.BODY, "stream": False}).json()
        assert final["data"] == plain["data"]
        assert final["object"] == "perplexity"

    def test_sums_run_up_to_the_answer(self, client):
        *progress, final = events(client.post(PERPLEXITY, json=self.BODY).text)
        before, tokens = (0, 0.0), 0
        of_input = [(0, 0.0), (0, 0.0)]
        for event in progress:
            index = event["index"]
            added = (event["num_scored"], event["nll_sum"])
            tokens += event["window"]["end"] - event["window"]["start"]
            before = (before[0] + added[0], before[1] + added[1])
            of_input[index] = (of_input[index][0] + added[0], of_input[index][1] + added[1])
            assert event["tokens_done"] == tokens
            for sums, expected in ((event["corpus"], before), (event["input"], of_input[index])):
                assert (sums["num_scored"], sums["nll_sum"]) == (expected[0], pytest.approx(expected[1]))
                assert sums["perplexity"] == pytest.approx(math.exp(expected[1] / expected[0]))
        assert progress[-1]["corpus"]["perplexity"] == pytest.approx(final["corpus"]["perplexity"])
        for index, windows in enumerate((5, 2)):
            own = [event["input"] for event in progress if event["index"] == index]
            assert [part["windows_done"] for part in own] == list(range(1, windows + 1))
            assert {part["windows_total"] for part in own} == {windows}
            assert own[-1]["perplexity"] == pytest.approx(final["data"][index]["perplexity"])

    def test_windows_of_the_ladder_alone_are_no_part_of_the_sums(self, client):
        body = {"input": IDS, "lengths": [4, 8], "ladder": "suffix", "score_last": 3, "stream": True}
        *progress, final = events(client.post(PERPLEXITY, json=body).text)
        assert [event["corpus"]["num_scored"] for event in progress] == [10, 10, 10]
        assert progress[-1]["corpus"]["nll_sum"] == pytest.approx(final["data"][0]["nll_sum"])
        assert progress[-1]["tokens_done"] == progress[-1]["tokens_total"] == 11 + 4 + 8


def test_cached_tokens_are_those_of_all_windows(client):
    answer = score(client, window="sliding", context_length=4)
    # The fake engine finds what comes before a window in its cache.
    expected = sum(window["start"] for window in answer["data"][0]["windows"])
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": expected, "read_tokens": 19}


class TestScheduling:
    def test_scoring_is_background_work_by_default(self, client):
        score(client)
        (request,) = client.engine.requests
        scheduling = request.scheduling
        assert scheduling.priority == BACKGROUND.priority > 0
        assert (scheduling.tenant, scheduling.cache_salt) == ("", "")
        left = scheduling.deadline - time.monotonic()
        assert 590 < left <= 600

    def test_wishes_reach_every_part_of_the_work(self, client):
        wishes = {"priority": -3, "user": "ada", "cache_salt": "pepper", "timeout": 20.5}
        answer = score(client, input=[IDS] * 3, request_id="night-run", **wishes)
        assert answer["id"] == "ppl-night-run"
        assert len({request.request_id for request in client.engine.requests}) == 3
        for request in client.engine.requests:
            scheduling = request.scheduling
            assert (scheduling.priority, scheduling.tenant) == (-3, "ada")
            assert scheduling.cache_salt == "pepper"
            assert scheduling.deadline - time.monotonic() < 20.5

    def test_two_requests_of_one_name_do_not_meet(self, client):
        for _ in range(2):
            score(client, request_id="same")
        first, second = client.engine.requests
        assert first.request_id != second.request_id

    def test_timeout_above_the_servers_is_refused(self, client):
        check_refused(client, PERPLEXITY, {"input": IDS, "timeout": 601}, "timeout", says="600")


class TestQueue:
    def test_full_queue_refuses_a_new_request(self):
        with serving(FakeEngine(max_num_queued_reqs=0)) as client:
            answer = client.post(PERPLEXITY, json={"input": IDS})
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "7"

    def test_full_queue_does_not_end_a_request_that_is_half_done(self, client, monkeypatch):
        refusals = self.refuse(client, monkeypatch, retry_after=0, times=1)
        answer = score(client, input=[IDS] * 6)
        assert refusals
        assert [item["num_scored"] for item in answer["data"]] == [10] * 6

    def test_a_time_limit_ends_the_wait_for_the_queue(self, client, monkeypatch):
        self.refuse(client, monkeypatch, retry_after=3600, times=1)
        answer = client.post(PERPLEXITY, json={"input": [IDS] * 6, "timeout": 0.05})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert client.engine.free_blocks == client.engine.num_blocks

    def test_a_few_inputs_are_in_the_engine_at_a_time(self, client, monkeypatch):
        counts = []
        step = client.engine._step

        async def counting():
            counts.append(len(client.engine.active))
            await step()

        monkeypatch.setattr(client.engine, "_step", counting)
        score(client, input=[IDS] * 20)
        assert max(counts) == run.INPUTS_AT_ONCE

    @staticmethod
    def refuse(client, monkeypatch, *, retry_after, times):
        """Let the engine refuse the sixth input so many times."""
        real, refusals = client.engine.score, []

        def score_but_refuse(request):
            if request.request_id.endswith("-5") and len(refusals) < times:
                refusals.append(request)
                raise QueueFullError("full", retry_after=retry_after)
            return real(request)

        monkeypatch.setattr(client.engine, "score", score_but_refuse)
        return refusals


class TestCost:
    """What is too much is refused before the work, with the numbers."""

    @pytest.mark.parametrize(
        ("limit", "value", "body", "param", "says"),
        [
            ("MAX_INPUT_TOKENS", 30, {}, "input", "3 input(s) of at most 11 tokens, 33 tokens in all"),
            ("MAX_WINDOWS", 15, {"window": "sliding", "stride": 2}, "stride", "33 tokens / 2 = 16 windows"),
            (
                "MAX_WINDOWS",
                11,
                {"window": "sliding", "context_length": 4},
                "input",
                "15 windows are above the limit of 11 windows",
            ),
            (
                "MAX_READ_TOKENS",
                56,
                {"window": "sliding", "context_length": 4},
                "input",
                "15 windows of 4 tokens on average, 57 in all, are above the limit of 56 tokens read",
            ),
            (
                "MAX_LOGPROB_ENTRIES",
                98,
                {"return_token_logprobs": True, "top_logprobs": 2},
                "top_logprobs",
                "33 tokens x (1 + 2) = 99 values",
            ),
        ],
    )
    def test_is_known_and_bounded(self, client, monkeypatch, limit, value, body, param, says):
        exact = value + 1 if limit != "MAX_INPUT_TOKENS" else 33
        monkeypatch.setattr(plan, limit, value)
        check_refused(client, PERPLEXITY, {"input": [IDS] * 3, **body}, param, says=says)
        assert all(not hasattr(request, "windows") for request in client.engine.requests)
        monkeypatch.setattr(plan, limit, max(exact, 16))
        score(client, input=[IDS] * 3, **body)

    def test_the_real_limits_hold_and_no_text_is_repeated(self, client):
        long = f"{CANARY} " * (limits.MAX_TEXT_BYTES // len(CANARY))
        check_refused(client, PERPLEXITY, {"input": long, "window": "sliding"}, "input")
        ids = [[259] * 8250] * 128
        assert sum(map(len, ids)) > limits.MAX_INPUT_TOKENS
        check_refused(client, PERPLEXITY, {"input": ids, "window": "sliding"}, "input", says="1056000 tokens")


def test_completions_and_scores_are_the_same_numbers_in_a_mixed_run(client):
    body = {"prompt": IDS, "echo": True, "logprobs": 0, "max_tokens": 1}
    choice = client.post(COMPLETIONS, json=body).json()["choices"][0]
    (data,) = score(client, return_token_logprobs=True)["data"]
    assert choice["logprobs"]["token_logprobs"][: len(IDS)] == data["token_logprobs"]
    assert data["token_logprobs"][1] == logprob(IDS[0], IDS[1], 1)
