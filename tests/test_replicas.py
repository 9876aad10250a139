"""What makes many engines look like one, without Ray: routing, going on elsewhere, messages, metrics."""

from __future__ import annotations

import asyncio
import pickle
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from dape_engine.errors import SettingsError, StepError
from dape_engine.grammar import GrammarCompiler
from dape_engine.inspection import InspectionRequest
from dape_engine.request import (
    GenerationOutput,
    GenerationRequest,
    PromptProgress,
    SamplingParams,
    Scheduling,
    ScoreRequest,
    TokenLogprob,
    Window,
    WindowScores,
)
from dape_server.cli import cli
from dape_server.metrics import Exchange, Metrics
from dape_server.replicas.gather import gathered
from dape_server.replicas.metrics import FrontMetrics
from dape_server.replicas.order import Request, pack, unpack
from dape_server.replicas.resume import GenerationResume, ScoreResume
from dape_server.replicas.routing import MAX_BLOCKS, PrefixTable, preference, prompt_keys
from fakes import FakeEngine

SLACK = 2


def generation(prompt: tuple[int, ...], **more: Any) -> GenerationRequest:
    return GenerationRequest("r", prompt, SamplingParams(**more))


def keys(*prompt: int) -> list[bytes]:
    return prompt_keys(generation(prompt), 2)


def test_the_keys_of_a_prompt_are_those_of_its_full_blocks() -> None:
    first = keys(1, 2, 3, 4, 5)
    assert len(first) == 2
    assert keys(1, 2, 3, 4, 6, 7)[:2] == first
    assert keys(1, 2, 9, 4)[0] == first[0]
    assert keys(1, 2, 9, 4)[1] != first[1]
    salted = replace(generation((1, 2)), scheduling=Scheduling(cache_salt="s"))
    assert prompt_keys(salted, 2) != keys(1, 2)
    assert len(keys(*range(3 * MAX_BLOCKS))) == MAX_BLOCKS


def test_every_kind_of_request_has_keys() -> None:
    tokens = (9, 1, 2, 3, 4)
    requests: list[Request] = [
        generation(tokens[1:]),
        ScoreRequest("r", tokens, (Window(1, 5, 2), Window(0, 3, 1))),
        InspectionRequest("r", (1, 2, 3, 4, 5, 6), 3, (0,), (0,)),
    ]
    assert [prompt_keys(request, 2) for request in requests] == [keys(1, 2, 3, 4)] * 3


def test_a_prompt_goes_where_its_longest_prefix_went() -> None:
    table, loads = PrefixTable(), {"a": 0, "b": 0, "c": 0}
    table.note(keys(1, 2, 3, 4), "a")
    table.note(keys(1, 2, 5, 6), "b")
    ranks = [preference(keys(*prompt), loads, table, SLACK) for prompt in ((1, 2, 3, 4, 7, 8), (1, 2, 5, 6))]
    assert [rank[0] for rank in ranks] == [["a"], ["b"]]
    assert all(len(set(rank[1])) == 2 for rank in ranks)


@pytest.mark.parametrize(("load", "goes"), [(SLACK, True), (SLACK + 1, False)])
def test_a_busy_owner_is_passed_over(load: int, goes: bool) -> None:
    table = PrefixTable()
    table.note(keys(1, 2), "a")
    ranks = preference(keys(1, 2), {"a": load + 1, "b": 1}, table, SLACK)
    assert (ranks[0] == ["a"]) is goes
    assert sorted(ranks[-1]) == ["a", "b"]


def test_a_short_or_lost_match_is_none() -> None:
    table, loads = PrefixTable(), {"a": 0, "b": 0}
    table.note(keys(1, 2), "a")
    long = keys(1, 2, *range(10, 18))
    assert table.owner(long, loads) is None
    assert table.owner(long[:4], loads) == "a"
    assert table.owner(long[:4], {"b": 0}) is None
    assert table.owner([], loads) is None


def test_the_table_forgets_what_was_sent_longest_ago() -> None:
    table, loads = PrefixTable(capacity=2), {"a": 0}
    for prompt in ((1, 2), (3, 4), (1, 2), (5, 6)):
        table.note(keys(*prompt), "a")
    assert [table.owner(keys(*prompt), loads) for prompt in ((1, 2), (3, 4), (5, 6))] == ["a", None, "a"]


def test_without_a_prefix_two_of_all_are_chosen_evenly() -> None:
    seen: Counter[str] = Counter()
    for _ in range(300):
        [two] = preference([], {"a": 0, "b": 5, "c": 0}, PrefixTable(), SLACK)
        seen.update(two)
    assert seen.keys() == {"a", "b", "c"}
    assert min(seen.values()) > 120
    assert preference([], {"a": 3}, PrefixTable(), SLACK) == [["a"]]


def outputs(*sizes: int, seed: int = 0) -> list[GenerationOutput]:
    """Outputs of so many tokens each; token t is written as "<t>"."""
    found, count = [], 0
    for size in sizes:
        ids = tuple(range(count + seed, count + seed + size))
        text = "".join(f"<{token}>" for token in ids)
        entries = tuple(TokenLogprob(token, -1.0) for token in ids)
        offsets = tuple(sum(len(f"<{t}>") for t in range(token)) for token in ids)
        found.append(GenerationOutput(text, ids, entries, offsets))
        count += size
    return [*found[:-1], replace(found[-1], finish_reason="length")]


def test_a_text_goes_on_where_it_was_lost() -> None:
    resume = GenerationResume(generation((1,), max_tokens=6))
    first = [resume.news(output) for output in outputs(1, 1, 1, 3)[:3]]
    again = resume.request()
    assert again == resume.request()
    assert again.sampling.seed is not None
    second = [resume.news(output) for output in outputs(2, 3, 1)]
    assert second[0] is None
    got = [output for output in (*first, *second) if output is not None]
    assert "".join(output.text for output in got) == "<0><1><2><3><4><5>"
    assert [token for output in got for token in output.token_ids] == list(range(6))
    assert [entry.token_id for output in got for entry in output.logprobs] == list(range(6))
    assert [offset for output in got for offset in output.text_offsets] == [0, 3, 6, 9, 12, 15]
    assert got[-1].finish_reason == "length"
    assert resume.finished


def test_what_comes_once_comes_once() -> None:
    resume = GenerationResume(generation((1, 2), max_tokens=2, seed=5))
    progress = GenerationOutput("", (), progress=PromptProgress(2, 0, 1, 0.1))
    begun = GenerationOutput("a", (1,), prompt_logprobs=(None, None), num_cached_tokens=1)
    assert resume.request().sampling.seed == 5
    assert [resume.news(output) for output in (progress, begun)] == [progress, begun]
    resume.request()
    assert [resume.news(output) for output in (progress, begun)] == [None, None]
    held = resume.news(GenerationOutput("bc", (2,), prompt_logprobs=(None, None), finish_reason="stop"))
    assert held == GenerationOutput("bc", (2,), finish_reason="stop")


def test_text_that_was_held_back_is_told_in_full() -> None:
    """An attempt may tell the same tokens with more or less of their text."""
    resume = GenerationResume(generation((1,), max_tokens=3))
    resume.news(GenerationOutput("ab", (1, 2)))
    resume.request()
    told = [resume.news(output) for output in (GenerationOutput("a", (1, 2)), GenerationOutput("bcd", (3,)))]
    assert told[0] is None
    assert told[1] == GenerationOutput("cd", (3,))


def test_another_text_is_not_taken_for_the_same() -> None:
    resume = GenerationResume(generation((1,), max_tokens=4))
    resume.news(outputs(2, 2)[0])
    resume.request()
    with pytest.raises(StepError, match="cannot be continued exactly"):
        resume.news(outputs(2, 2, seed=1)[0])


def test_greedy_requests_need_no_seed() -> None:
    assert GenerationResume(generation((1,), temperature=0)).request().sampling.seed is None


def test_scores_go_on_at_the_first_missing_token() -> None:
    windows = (Window(0, 4, 1), Window(0, 8, 4), Window(4, 12, 8))
    resume = ScoreResume(ScoreRequest("r", tuple(range(12)), windows, in_pieces=True))
    pieces = [
        WindowScores(Window(0, 4, 1), (-1.0,) * 3),
        WindowScores(Window(0, 6, 4), (-1.0,) * 2),
    ]
    assert [resume.news(piece) for piece in pieces] == pieces
    rest = resume.request()
    assert rest.windows == (Window(0, 8, 6), Window(4, 12, 8))
    assert rest.in_pieces
    # The tokens before are read once more, which is no news.
    assert resume.news(WindowScores(Window(0, 5, 5), ())) is None
    last = [WindowScores(Window(0, 8, 6), (-1.0,) * 2), WindowScores(Window(4, 12, 8), (-1.0,) * 4)]
    assert resume.news(last[0]) == last[0]
    assert not resume.finished
    assert resume.news(last[1]) == last[1]
    assert resume.finished


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    engine = FakeEngine()
    return GrammarCompiler(engine.tokenizer, engine.config.vocab_size)


def test_an_order_is_the_same_request_in_another_process(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile("choice", ["on"], "structured_outputs.choice").constraint()
    deadline = time.monotonic() + 100
    request = replace(generation((1, 2)), constraint=constraint, scheduling=Scheduling(3, "t", "s", deadline))
    order = pickle.loads(pickle.dumps(pack(request)))
    found = unpack(order, compiler)
    assert isinstance(found, GenerationRequest)
    assert found.scheduling.deadline == pytest.approx(deadline, abs=0.1)
    assert (found.constraint.text, found.constraint.field) == (constraint.text, constraint.field)
    same = replace(found, constraint=None, scheduling=request.scheduling)
    assert same == replace(request, constraint=None)
    plain = generation((1,))
    assert unpack(pickle.loads(pickle.dumps(pack(plain))), compiler) == plain


async def test_items_that_come_fast_go_together() -> None:
    async def source():
        for number in range(50):
            yield number
            await asyncio.sleep(0)

    lists = [items async for items in gathered(source(), lambda: 60)]
    assert lists[0] == [0]
    assert len(lists) == 2
    assert [number for numbers in lists for number in numbers] == list(range(50))


async def test_the_last_items_come_before_the_error() -> None:
    async def source():
        yield 1
        yield 2
        raise StepError("broken")

    lists = gathered(source(), lambda: 0)
    seen = await anext(lists)
    while len(seen) < 2:
        seen += await anext(lists)
    assert seen == [1, 2]
    with pytest.raises(StepError, match="broken"):
        await anext(lists)


async def test_closing_closes_the_source() -> None:
    closed = asyncio.Event()

    async def source():
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    lists = gathered(source(), lambda: 0)
    assert await anext(lists) == [1]
    await lists.aclose()
    assert closed.is_set()


def test_one_exposition_for_all_replicas() -> None:
    replicas = [Metrics("m", "0"), Metrics("m", "1")]
    for count, metrics in enumerate(replicas, 1):
        for _ in range(count):
            metrics.on_http(Exchange("/v1/completions", "POST", 200, 0.1, 1, 1, None))
            metrics._generation_tokens.inc(5)
    front = FrontMetrics(
        "m", lambda: [(str(n), list(metrics.registry.collect())) for n, metrics in enumerate(replicas)]
    )
    front.watch(lambda: None, 16)
    front.on_http(Exchange("/v1/completions", "POST", 401, 0.1, 1, 1, "invalid_api_key"))
    front.on_completion_request(2)
    lines = front.exposition().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['dape:generation_tokens_total{engine="0",model_name="m"}'] == "5.0"
    assert values['dape:generation_tokens_total{engine="1",model_name="m"}'] == "10.0"
    # What is counted at the door is counted there only.
    assert {value for line, value in values.items() if line.startswith("http_requests_total")} == {"1.0"}
    refused = 'dape:request_errors_total{code="invalid_api_key",engine="front",model_name="m"}'
    assert values[refused] == "1.0"
    assert values['dape:request_params_n_sum{engine="front",model_name="m"}'] == "2.0"
    assert values['dape:replicas{engine="front",model_name="m"}'] == "2.0"
    assert 'dape:generation_tokens_total{engine="front",model_name="m"}' not in values
    assert values.keys() >= {f"process_cpu_seconds_total{label}" for label in ("", '{engine="0"}')}
    heads = [line for line in lines if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    assert len(values) == len([line for line in lines if not line.startswith("#")])


def serve(*options: str) -> None:
    """Run `dape serve`, which must refuse."""
    CliRunner().invoke(cli, ["serve", "--port", "0", *options], catch_exceptions=False)


def test_bounds_without_replicas_are_refused() -> None:
    with pytest.raises(SettingsError, match="--max-replicas: has no meaning without --replicas"):
        serve("--max-replicas", "3")


def test_replicas_without_ray_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "dape_server.replicas.run", raising=False)
    monkeypatch.delitem(sys.modules, "dape_server.replicas.cluster", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"needs the package ray; pip install 'dape-serve\[ray\]'"):
        serve("--replicas", "2")
