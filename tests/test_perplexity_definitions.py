"""POST /v1/perplexity on real models gives the numbers of others' definitions, each computed apart.

The log-probabilities come of plain forward passes with the reference attention, and the windows of lm-eval
itself or of loops written out here: nothing of `dape_engine.scoring` or `dape_engine.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from torch.nn.functional import nll_loss

from dape_engine.engine import AsyncEngine
from dape_engine.options import EngineOptions
from dape_engine.weights import DEFAULT_MODEL, resolve_model
from dape_server.app import create_app
from dape_server.settings import ServerSettings
from models import TEXT, plain_logprobs, write_model

TOLERANCE = 1e-4
CONTEXT = 40


class Server:
    """A server over a real engine, and the plain model beside it."""

    def __init__(self, folder: Path, client: TestClient):
        self.folder = folder
        self.client = client
        tokens = self.post("/tokenize", prompt=TEXT[0] * 2)["tokens"]
        self.bos = 0
        self.ids: list[int] = tokens[:107]

    def post(self, path: str, **body: Any) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def score(self, ids: list[int], **body: Any) -> Any:
        answer = self.post("/v1/perplexity", input=ids, return_token_logprobs=True, **body)
        (data,) = answer["data"]
        return data

    def plain(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities [tokens, vocabulary] of what follows each token."""
        return plain_logprobs(self.folder, ids).double()

    def nlls(self, context: list[int], targets: list[int]) -> list[float]:
        """NLL of each target token after the context and the targets before it."""
        logprobs = self.plain(context + targets)
        places = range(len(context) - 1, len(context) + len(targets) - 1)
        return [-float(logprobs[place, token]) for place, token in zip(places, targets, strict=True)]


@pytest.fixture(scope="module", params=["random", "shipped"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param == "random":
        folder = write_model(tmp_path_factory.mktemp("models") / "tiny")
    else:
        folder = resolve_model(DEFAULT_MODEL)
    options = EngineOptions(kv_cache_memory=32 << 20, block_size=8, max_num_batched_tokens=64)
    with TestClient(create_app(AsyncEngine(folder, options), ServerSettings())) as client:
        yield Server(folder, client)


def check(data: Any, nlls: list[float]) -> None:
    """Compare an answer with the NLLs of all scored tokens, in order."""
    scored = [-value for value in data["token_logprobs"] if value is not None]
    assert scored == pytest.approx(nlls, abs=TOLERANCE)
    assert data["num_scored"] == len(nlls)
    assert data["nll_sum"] == pytest.approx(sum(nlls), rel=TOLERANCE)
    mean = sum(nlls) / len(nlls)
    assert data["mean_nll"] == pytest.approx(mean, abs=TOLERANCE)
    assert data["perplexity"] == pytest.approx(math.exp(mean), rel=TOLERANCE)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_completions_echo(server: Server, max_tokens: int) -> None:
    data = server.score(server.ids, top_logprobs=3)
    choice = server.post(
        "/v1/completions", prompt=server.ids, echo=True, logprobs=3, max_tokens=max_tokens, temperature=0
    )["choices"][0]
    count = len(server.ids)
    echoed = choice["logprobs"]["token_logprobs"]
    assert len(echoed) == count + max_tokens
    assert echoed[0] is data["token_logprobs"][0] is None
    assert data["token_logprobs"][1:] == pytest.approx(echoed[1:count], abs=TOLERANCE)
    for own, other in zip(data["top_logprobs"][1:], choice["logprobs"]["top_logprobs"][1:count], strict=True):
        assert own == pytest.approx(other, abs=TOLERANCE)
    check(data, server.nlls(server.ids[:1], server.ids[1:]))


@pytest.mark.parametrize("context_length", [CONTEXT, 107, 400])
def test_lm_evals_rolling_likelihood(server: Server, context_length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    windows = utils.get_rolling_token_windows(
        server.ids, prefix_token=server.bos, max_seq_len=context_length - 1, context_len=1
    )
    nlls = []
    for window in windows:
        context, targets = utils.make_disjoint_window(window)
        # The client sends them as one prompt, cut to its own limit from the left.
        assert len(context) + len(targets) <= context_length
        nlls += server.nlls(context, targets)
    assert len(nlls) == len(server.ids)
    data = server.score(server.ids, bos=server.bos, window="disjoint", context_length=context_length)
    check(data, nlls)
    assert data["bos"]["first_token_scored"]


def test_lm_evals_units(server: Server) -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    text = TEXT[0]
    ids = server.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    likelihood = -sum(server.nlls([server.bos], ids))
    (data,) = server.post("/v1/perplexity", input=text, bos=server.bos)["data"]
    words, size = len(text.split()), len(text.encode())
    assert (data["num_words"], data["num_bytes"]) == (words, size)
    expected = metrics.weighted_perplexity([(likelihood, words)])
    assert data["word_perplexity"] == pytest.approx(expected, rel=TOLERANCE)
    assert data["bits_per_byte"] == pytest.approx(metrics.bits_per_byte([(likelihood, size)]), rel=TOLERANCE)


@pytest.mark.parametrize("stride", [3, 7, 20, CONTEXT - 1])
def test_the_hugging_face_guides_loop(server: Server, stride: int) -> None:
    """Labels that an earlier window has seen are masked; the loss shifts the rest by one."""
    ids = torch.tensor(server.ids)
    seen, nlls = 0, []
    for begin in range(0, len(ids), stride):
        end = min(begin + CONTEXT, len(ids))
        part = ids[begin:end]
        labels = part.clone()
        labels[: len(part) - (end - seen)] = -100
        losses = nll_loss(server.plain(part.tolist())[:-1], labels[1:], ignore_index=-100, reduction="none")
        nlls += losses[labels[1:] != -100].tolist()
        seen = end
        if end == len(ids):
            break
    data = server.score(server.ids, window="sliding", context_length=CONTEXT, stride=stride)
    check(data, nlls)


@pytest.mark.parametrize("size", [CONTEXT, 41, 107])
def test_llama_cpps_half_windows(server: Server, size: int) -> None:
    """Chunks that each begin with BOS in place of their first token; outputs from size / 2 on count."""
    ids = [server.bos, *server.ids]
    total = squares = 0.0
    nlls = []
    for chunk in range(len(ids) // size):
        part = ids[chunk * size : (chunk + 1) * size]
        outputs = server.plain([server.bos, *part[1:]])
        for place in range(size // 2, size - 1):
            nll = -float(outputs[place, part[place + 1]])
            nlls.append(nll)
            total += nll
            squares += nll * nll
    count = len(nlls)
    mean = total / count
    uncertainty = math.sqrt((squares / count - mean * mean) / (count - 1)) * math.exp(mean)
    data = server.score(ids, window="half", context_length=size)
    check(data, nlls)
    assert data["stderr"] == pytest.approx(uncertainty, rel=10 * TOLERANCE)


def test_the_papers_last_tokens_by_length(server: Server) -> None:
    """The last 16 tokens with growing context, and the last 16 of growing beginnings."""
    lengths, last = [24, 48, 107], 16
    suffix = server.score(server.ids, window="last", score_last=last, lengths=lengths, ladder="suffix")
    prefix = server.score(server.ids, score_last=last, lengths=lengths)
    for place, length in enumerate(lengths):
        for data, part in ((suffix, server.ids[-length:]), (prefix, server.ids[:length])):
            nlls = server.nlls(part[:-last], part[-last:])
            rung = data["ladder"][place]
            assert (rung["length"], rung["num_scored"]) == (length, last)
            assert rung["nll_sum"] == pytest.approx(sum(nlls), rel=TOLERANCE)
            assert rung["perplexity"] == pytest.approx(math.exp(sum(nlls) / last), rel=TOLERANCE)
            error = math.exp(np.mean(nlls)) * np.std(nlls, ddof=1) / math.sqrt(last)
            assert rung["stderr"] == pytest.approx(error, rel=10 * TOLERANCE)


def test_a_paired_difference_of_two_contexts(server: Server) -> None:
    """The same tokens with less context, as a reference: what the context is worth."""
    whole = server.nlls(server.ids[:1], server.ids[1:])
    short = server.score(server.ids, window="sliding", context_length=CONTEXT, stride=1)
    reference = [None if value is None else -value for value in short["token_logprobs"]]
    found = server.score(server.ids, reference=[reference])["paired_difference"]
    deltas = np.array(whole) - np.array(reference[1:], dtype=float)
    assert found["num_paired"] == len(whole)
    assert found["mean_difference"] == pytest.approx(deltas.mean(), abs=TOLERANCE)
    assert found["stderr"] == pytest.approx(deltas.std(ddof=1) / math.sqrt(len(deltas)), abs=TOLERANCE)


def test_a_time_limit_ends_the_work(server: Server) -> None:
    body = {
        "input": [server.ids] * 40,
        "window": "sliding",
        "context_length": 64,
        "stride": 1,
        "timeout": 0.02,
    }
    answer = server.client.post("/v1/perplexity", json=body)
    assert answer.status_code == 504, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    check(server.score(server.ids), server.nlls(server.ids[:1], server.ids[1:]))


def test_scoring_again_is_the_same_and_reads_the_cache(server: Server) -> None:
    body = {"input": server.ids, "return_token_logprobs": True, "window": "sliding", "context_length": 64}
    first = server.post("/v1/perplexity", **body, cache_salt="one")
    again = server.post("/v1/perplexity", **body, cache_salt="one")
    apart = server.post("/v1/perplexity", **body, cache_salt="two")
    for other in (again, apart):
        assert other["data"][0]["token_logprobs"][1:] == pytest.approx(
            first["data"][0]["token_logprobs"][1:], abs=TOLERANCE
        )
    cached = [answer["usage"]["prompt_tokens_details"] for answer in (first, again, apart)]
    assert cached[0] == cached[2]
    assert cached[1]["cached_tokens"] > cached[0]["cached_tokens"]
    assert cached[1]["read_tokens"] == cached[0]["read_tokens"] >= cached[1]["cached_tokens"]
