"""The arithmetic of load tests: formulas, arrivals, workload, objectives, reports."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pytest

from dape_engine.errors import SettingsError
from dape_load.objectives import Bound, judge, load_objectives
from dape_load.phases import MIXTURES
from dape_load.report import show, write_html
from dape_load.watch import Sample, growth
from dape_load.workload import MIX, Sizes, Workload
from dape_server.load.client import lines
from dape_server.load.figures import FORMULAS, summarise
from dape_server.load.loops import poisson_arrivals
from dape_server.load.records import Record, retry_seconds
from run import parse_goodput
from smoke import OBJECTIVES, PHASES

LOAD_TESTS = Path(__file__).parents[1] / "load_tests"


def record(sent: float, outputs: list[float], tokens: int, ended: float | None = None, **more: Any) -> Record:
    last = outputs[-1] if outputs else sent
    return Record(
        "stream", sent, **{"status": 200, **more}, outputs=outputs, output_tokens=tokens, ended=ended or last
    )


# Formulas


def test_every_figure_follows_its_formula() -> None:
    records = [
        record(10.0, [10.1, 10.2, 10.4], tokens=3, ended=10.5, prompt_tokens=100),
        # Two tokens in its last output.
        record(10.5, [10.7, 10.8, 11.2], tokens=4, ended=12.0, prompt_tokens=20),
    ]
    figures = summarise(records, {"ttft_ms": 150, "tpot_ms": 1000})
    assert figures.keys() <= FORMULAS.keys()
    assert (figures["requests"], figures["failed"], figures["seconds"]) == (2, 0, 2.0)
    assert figures["output_tokens_per_s"] == pytest.approx(7 / 2)
    assert figures["prompt_tokens_per_s"] == pytest.approx(120 / 2)
    assert figures["tokens_per_output"] == pytest.approx(7 / 6)
    assert figures["ttft_ms"]["mean"] == pytest.approx(150)
    assert figures["ttft_ms"]["max"] == pytest.approx(200)
    assert figures["itl_ms"]["count"] == 4
    assert figures["itl_ms"]["mean"] == pytest.approx((100 + 200 + 100 + 400) / 4)
    assert figures["tpot_ms"]["mean"] == pytest.approx((300 / 2 + 500 / 3) / 2)
    assert figures["e2e_ms"]["p50"] == pytest.approx((500 + 1500) / 2)
    assert figures["goodput_per_s"] == pytest.approx(1 / 2)


def test_percentiles_are_linear_between_samples() -> None:
    gaps = record(0.0, [0.0, *(k * (k + 1) / 2e3 for k in range(1, 101))], tokens=101)
    figures = summarise([gaps])["itl_ms"]
    assert (figures["p50"], figures["p95"], figures["p99"]) == pytest.approx((50.5, 95.05, 99.01))


def test_only_whole_answers_are_timed() -> None:
    records = [
        record(0.0, [1.0, 2.0], tokens=2),
        record(0.0, [0.1, 0.2], tokens=2, hung_up=True),
        record(0.0, [0.1], tokens=0, error="the stream ended"),
        record(0.0, [], tokens=0, ended=0.02, status=429, retry_after="1"),
        record(0.0, [], tokens=0, status=400, error="400: wrong"),
        record(0.0, [], tokens=0, status=0, error="ConnectionError"),
    ]
    figures = summarise(records)
    assert (figures["failed"], figures["refused"], figures["hung_up"]) == (3, 1, 1)
    assert figures["ttft_ms"]["count"] == figures["itl_ms"]["count"] == 1
    assert figures["refusal_ms"]["max"] == pytest.approx(20)
    assert figures["requests_per_s"] == pytest.approx(1 / 2)


def test_nothing_is_made_up_where_nothing_was_measured() -> None:
    assert summarise([]) == {"requests": 0, "failed": 0, "refused": 0, "hung_up": 0}
    scored = summarise([record(0.0, [], tokens=0, ended=1.0, prompt_tokens=5)])
    assert not {"ttft_ms", "itl_ms", "tpot_ms", "tokens_per_output", "goodput_per_s"} & scored.keys()


def test_goodput_limits_are_read_and_refused_by_name() -> None:
    assert parse_goodput("ttft_ms=200,tpot_ms=50") == (("ttft_ms", 200.0), ("tpot_ms", 50.0))
    for text in ("ttft_ms", "itl_ms=5", "ttft_ms=fast"):
        with pytest.raises(SettingsError, match="--goodput"):
            parse_goodput(text)


# Reading answers


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode()


def choice(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}


def test_outputs_are_chunks_with_text_or_before_the_last() -> None:
    stream = [
        (1.0, b": keep-alive"),
        (2.0, event(**choice("a"))),
        (3.0, event(**choice(""))),  # a token without a complete character
        (4.0, event(**choice("bc"))),  # two tokens
        (5.0, event(**choice("", "length"))),
        (6.0, event(choices=[], **USAGE)),
        (7.0, b"data: [DONE]"),
    ]
    read = Record("stream", 0.0, 200)
    read.read_stream(stream)
    assert (read.outputs, read.prompt_tokens, read.output_tokens) == ([2.0, 3.0, 4.0], 3, 4)
    assert read.succeeded
    for lost in (4, 5, 6):
        partial = Record("stream", 0.0, 200)
        partial.read_stream(stream[:lost] + stream[lost + 1 :])
        assert partial.failed


def test_an_error_in_a_stream_is_a_failure() -> None:
    read = Record("stream", 0.0, 200)
    read.read_stream([(1.0, event(error={"message": "the model failed"})), (2.0, b"data: [DONE]")])
    assert (read.failed, read.error) == (True, "the model failed")


def test_lines_arrive_with_their_last_byte() -> None:
    pieces = [(1.0, b"data: a\n\nda"), (2.0, b"ta: b"), (3.0, b"\n")]
    assert lines(pieces) == [(1.0, b"data: a"), (1.0, b""), (3.0, b"data: b")]


@pytest.mark.parametrize(("told", "seconds"), [("2", 2.0), ("600", 5.0), (None, 1.0), ("soon", 1.0)])
def test_a_refused_client_waits_as_told_but_not_for_ever(told: str | None, seconds: float) -> None:
    waits = [retry_seconds(Record("x", 0.0, 429, retry_after=told)) for _ in range(100)]
    assert seconds <= min(waits) < max(waits) <= 1.5 * seconds


# Arrivals


def test_open_loop_arrivals_are_poisson_with_the_seed() -> None:
    arrivals = poisson_arrivals(50, 200, seed=7)
    assert arrivals == poisson_arrivals(50, 200, seed=7)
    assert arrivals != poisson_arrivals(50, 200, seed=8)
    assert arrivals[0] > 0
    assert arrivals[-1] < 200
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert min(gaps) > 0
    # Exponential gaps: mean and deviation are 1 / rate, and half of them are shorter than ln 2 / rate.
    assert mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert pstdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert sum(gap < 0.6931 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.5, abs=0.02)


# Workload


def test_requests_follow_the_mixture_and_no_two_prompts_begin_alike() -> None:
    sizes = Sizes(prompt_tokens=50, output_tokens=8, chat_tokens=20, score_tokens=300, long_tokens=200)
    requests = list(islice(Workload("m", sizes, 0.5, seed=1).endless(MIX), 600))
    kinds = [request.kind for request in requests]
    assert kinds.count("chat") / 600 == pytest.approx(0.7, abs=0.06)
    assert kinds.count("score") / 600 == pytest.approx(0.2, abs=0.06)
    texts = [request.body.get("prompt") or request.body["input"] for request in requests]
    assert len({text[:12] for text in texts}) == 600
    lengths = {kind: {len(t) for k, t in zip(kinds, texts, strict=True) if k == kind} for kind in MIX}
    assert lengths == {"chat": {40}, "score": {600}, "long": {384}}
    again = islice(Workload("m", sizes, 0.5, seed=1).endless(MIX), 600)
    assert [request.body for request in again] == [request.body for request in requests]


def test_texts_are_scored_by_echo_where_asked() -> None:
    workload = Workload("m", Sizes(score_tokens=10), 0.5, 0, score_route="/v1/completions")
    request = workload.request("score")
    assert request.path == "/v1/completions"
    assert request.body["echo"]


def test_every_mixture_has_a_scenario_file() -> None:
    files = {path.stem for path in (LOAD_TESTS / "scenarios").glob("*.py")}
    assert files == MIXTURES.keys()


# Objectives

FIGURES = {"stream": {"failed": 1, "itl_ms": {"p99": 12.0}}, "extra": {"leaked_blocks": 0}}


def test_objectives_are_met_broken_or_not_measured() -> None:
    bounds = {
        "stream.itl_ms.p99": Bound(at_most=12),
        "extra.leaked_blocks": Bound(at_most=0),
        "stream.failed": Bound(at_most=0),
        "stream.ttft_ms.p95": Bound(at_most=1000),
        "stream.itl_ms.p99.x": Bound(at_most=1),
    }
    verdicts = judge(bounds, FIGURES)
    assert [verdict.met for verdict in verdicts] == [True, True, False, False, False]
    assert str(verdicts[2]) == "BROKEN: stream.failed is 1, wanted at most 0"
    assert "not measured" in str(verdicts[3])
    [least] = judge({"stream.failed": Bound(at_least=2)}, FIGURES)
    assert not least.met


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: {at_mots: 1}}", "at_mots"),
        ("a: {b: 1}", "b"),
        ("a: [", "YAML"),
        ("a: {b: {at_most: .nan}}", "finite"),
    ],
)
def test_a_wrong_file_of_objectives_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "objectives.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_objectives(path)


def test_the_objectives_in_the_box_are_those_of_the_smoke_test() -> None:
    objectives = load_objectives(OBJECTIVES)
    assert objectives.keys() == {*PHASES, "soak"}
    assert all("all.failed" in bounds for bounds in objectives.values())


# Reports


def test_formulas_stand_beside_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "figures": {"<b>": summarise([record(0.0, [0.1, 0.2], tokens=2)])},
        "settings": {"loop": "closed, 1 users, locust", "model": "m"},
        "extra": {"leaked_blocks": 0},
        "errors": ["<script>"],
    }
    verdicts = judge({"stream.failed": Bound(at_most=0)}, FIGURES)
    show("streaming", result, verdicts)
    write_html(tmp_path / "page.html", {"streaming": result}, {"streaming": verdicts})
    page = (tmp_path / "page.html").read_text()
    printed = capsys.readouterr().out
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        assert name in page
        assert FORMULAS[name] in printed
    assert "BROKEN: stream.failed" in page
    assert "BROKEN: stream.failed" in printed
    assert "<script>" not in page
    assert "<b>" not in page


def test_growth_leaves_out_the_first_third_and_single_peaks() -> None:
    def sample(minute: int, memory: float, files: float, health: float = 2) -> Sample:
        return {"seconds": 60.0 * minute, "memory_mib": memory, "open_files": files, "health_ms": health}

    filling = [sample(minute, 10 * minute, 3) for minute in range(15)]
    rising = [sample(minute, 100 + minute, 7) for minute in range(15, 45)]
    peak = [sample(45, 900, 90, health=40)]
    figures = growth([*filling, *rising, *peak])
    assert figures["samples"] == 46
    assert figures["memory_mib_growth"] == pytest.approx(15.5)
    assert figures["memory_mib_per_hour"] == pytest.approx(60)
    assert figures["open_files_growth"] == figures["health_ms_growth"] == 0
    assert (figures["open_files"], figures["health_ms_max"]) == (90, 40)
    assert "threads" not in figures
    assert growth(rising[:5]) == {"samples": 5}


@pytest.mark.parametrize(("grown", "met"), [(0.0, True), (17.0, False)])
def test_growth_breaks_the_objectives_of_a_soak(grown: float, met: bool) -> None:
    bounds = load_objectives(OBJECTIVES)["soak"]
    extra = {path.removeprefix("extra."): 0.0 for path in bounds} | {"memory_mib_growth": grown}
    verdicts = judge(bounds, {"all": {"failed": 0, "refused": 0}, "extra": extra})
    assert all(verdict.met for verdict in verdicts) == met
