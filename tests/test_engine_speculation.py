"""The engine with speculative decoding: the same answers as without, in fewer steps, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dape_engine.engine import AsyncEngine
from dape_engine.grammar import GrammarCompiler
from dape_engine.options import EngineOptions
from dape_engine.request import (
    GenerationOutput,
    GenerationRequest,
    RequestStats,
    SamplingParams,
    Scheduling,
    StepStats,
)
from dape_engine.speculation import RowCosts, SpeculativeConfig
from engines import SMALL, drawn, engine_of, generate, tokens
from models import write_model

ON, OFF = SpeculativeConfig(prompt_lookup_min=1), SpeculativeConfig(num_speculative_tokens=0)
LONG = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True, scope="module")
def free_rows() -> Iterator[None]:
    """Whatever the clock says, all that is proposed is verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowCosts, "seconds", lambda *_: 1.0)
        yield


class Recorder:
    """Keeps what the engine reports of its steps."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_finished(self, stats: RequestStats) -> None:
        pass

    @property
    def accepted(self) -> int:
        return sum(accepted for step in self.steps for _, accepted in step.drafts)

    @property
    def proposed(self) -> int:
        return sum(proposed for step in self.steps for proposed, _ in step.drafts)


def repetitive(seed: int, length: int = 40) -> tuple[int, ...]:
    """A few pieces, again and again."""
    chance = random.Random(seed)
    pieces = [tokens(seed + 100 * index, chance.randrange(2, 6)) for index in range(3)]
    text = [token for _ in range(length) for token in chance.choice(pieces)]
    return tuple(text[:length])


def told(outputs: list[GenerationOutput]) -> tuple[Any, ...]:
    """All that a client hears but log-probabilities and where the prompt came from."""
    last = outputs[-1]
    return (
        "".join(output.text for output in outputs),
        drawn(outputs),
        [offset for output in outputs for offset in output.text_offsets],
        last.finish_reason,
        last.stop_reason,
    )


def check_equal(got: list[GenerationOutput], expected: list[GenerationOutput]) -> None:
    assert told(got) == told(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.text == other.text
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]


SAMPLINGS = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    "bias": {"logit_bias": ((7, 3.0), (9, -3.0)), "bad_words": ((5, 6), (11,))},
    "seeded": {"temperature": 0.3, "seed": 5},
    "filters": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "seed": 6},
    "min_tokens": {"min_tokens": 20, "ignore_eos": False},
    "allowed": {"allowed_token_ids": tuple(range(40, 60))},
}


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def engine(folder: Path, recorder: Recorder) -> Iterator[AsyncEngine]:
    """One for all examples, with fewer blocks than five long texts need."""
    engine = AsyncEngine(folder, EngineOptions(**{**SMALL, "kv_cache_memory": 60 * 4 * 512}), recorder)
    engine.start()
    yield engine
    assert recorder.accepted > 200
    asyncio.run(engine.shutdown(0))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_answer_is_the_same(engine: AsyncEngine, data: st.DataObject) -> None:
    """Whatever the text, the way of drawing, the stops, the neighbours and what they have cached."""
    requests = []
    for index in range(data.draw(st.integers(1, 5), label="requests")):
        seed = data.draw(st.integers(0, 9), label="prompt")
        prompt = repetitive(seed) if data.draw(st.booleans(), label="repeats") else tokens(seed, 25)
        name = data.draw(st.sampled_from(sorted(SAMPLINGS)), label="sampling")
        sampling = replace(LONG, **SAMPLINGS[name], max_tokens=data.draw(st.integers(1, 48)))
        salt = data.draw(st.sampled_from(["", str(index)]), label="salt")
        requests.append(GenerationRequest("r", prompt, sampling, scheduling=Scheduling(cache_salt=salt)))
    plain = asyncio.run(answers(engine, [replace(r, speculation=OFF) for r in requests]))
    cut = []
    for request, outputs in zip(requests, plain, strict=True):
        place = data.draw(st.integers(0, len(outputs) - 1), label="place")
        how = data.draw(st.sampled_from(["", "string", "token"]), label="stop")
        text = "".join(output.text for output in outputs)
        stop = text[place : place + data.draw(st.integers(1, 4))]
        more: dict[str, Any] = {"stop": (stop,)} if how == "string" and stop else {}
        if how == "token":
            more = {"stop_token_ids": (drawn(outputs)[place],)}
        cut.append(replace(request, sampling=replace(request.sampling, **more)))
    expected = asyncio.run(answers(engine, [replace(r, speculation=OFF) for r in cut]))
    got = asyncio.run(answers(engine, [replace(r, speculation=ON) for r in cut]))
    for one, other in zip(got, expected, strict=True):
        check_equal(one, other)
    assert engine.state().free_blocks == engine.num_blocks
    engine._scheduler.check_invariants()


async def answers(engine: AsyncEngine, requests: list[GenerationRequest]) -> list[list[GenerationOutput]]:
    async def answer(request: GenerationRequest) -> list[GenerationOutput]:
        return [output async for output in engine.generate(request)]

    return await asyncio.gather(*map(answer, requests))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(patience=st.lists(st.integers(0, 12), min_size=1, max_size=8))
def test_clients_may_leave_at_any_time(engine: AsyncEngine, patience: list[int]) -> None:
    async def visit(seed: int, outputs: int) -> list[int]:
        got = []
        stream = engine.generate(GenerationRequest("r", repetitive(seed), LONG, speculation=ON))
        async with aclosing(stream):
            for _ in range(outputs):
                got += (await anext(stream)).token_ids
        return got

    async def visits() -> list[list[int]]:
        return await asyncio.gather(*(visit(seed, count) for seed, count in enumerate(patience)))

    for seed, got in enumerate(asyncio.run(visits())):
        request = GenerationRequest("r", repetitive(seed), LONG, speculation=OFF)
        [plain] = asyncio.run(answers(engine, [request]))
        assert got == drawn(plain)[: len(got)]
    assert engine.state().free_blocks == engine.num_blocks
    engine._scheduler.check_invariants()


@pytest.mark.parametrize(
    "settings_",
    [
        {"position": {"kind": "alibi"}},
        {"position": {"kind": "rope", "fraction": 0.5}, "dape": {"width": 8}},
        {"position": {"kind": "fire", "mlp_width": 8, "init_length": 20}, "dape": {"width": 8}},
        {"position": {"kind": "learned", "max_positions": 256}},
        {"position": {"kind": "kerple"}, "dape": {"version": 2, "width": 8, "kernel": 3}},
    ],
    ids=["alibi", "rope", "fire", "learned", "version 2"],
)
async def test_every_encoding_verifies_several_rows_at_once(
    settings_: dict[str, Any], tmp_path: Path
) -> None:
    folder, recorder = write_model(tmp_path, max_model_len=256, **settings_), Recorder()
    async with engine_of(folder, recorder) as engine:
        for seed in range(4):
            expected = await generate(engine, repetitive(seed), LONG)
            check_equal(await generate(engine, repetitive(seed), LONG, speculation=ON), expected)
    assert recorder.accepted > 10


@pytest.mark.usefixtures("best_cpu")
async def test_the_fused_decoder_verifies_several_rows_at_once(folder: Path) -> None:
    recorder = Recorder()
    async with engine_of(folder, recorder, attention_backend="cpu", block_size=16) as engine:
        for seed in range(4):
            expected = await generate(engine, repetitive(seed), LONG)
            check_equal(await generate(engine, repetitive(seed), LONG, speculation=ON), expected)
    assert recorder.accepted > 10


async def test_accepted_tokens_save_steps_and_are_counted(folder: Path) -> None:
    plain, recorder = Recorder(), Recorder()
    prompt, sampling = repetitive(1), replace(LONG, max_tokens=100)
    async with engine_of(folder, plain) as engine:
        await generate(engine, prompt, sampling)
    async with engine_of(folder, recorder) as engine:
        outputs = await generate(engine, prompt, sampling, speculation=ON)
    assert [len(output.token_ids) for output in outputs] == [1] * 100
    assert recorder.accepted > 20
    assert len(recorder.steps) == len(plain.steps) - recorder.accepted
    assert sum(step.num_generated_tokens for step in recorder.steps) == 100
    rows = sum(step.num_tokens for step in recorder.steps)
    assert rows == len(prompt) + 99 + recorder.proposed - recorder.accepted
    # One for each step that has brought tokens, as before.
    assert sum(len(step.inter_token_seconds) for step in recorder.steps) == len(recorder.steps) - 1


async def test_tokens_drawn_behind_the_end_are_not_counted(folder: Path) -> None:
    recorder = Recorder()
    async with engine_of(folder, recorder) as engine:
        text = drawn(await generate(engine, repetitive(1), LONG))
        heard = len(text)
        for place in range(8, 40):
            stop = replace(LONG, stop_token_ids=(text[place],))
            outputs = await generate(engine, repetitive(1), stop, speculation=ON)
            assert drawn(outputs) == text[: text.index(text[place]) + 1]
            heard += len(drawn(outputs))
    assert sum(step.num_generated_tokens for step in recorder.steps) == heard


async def test_preempted_requests_give_the_same_answers(folder: Path) -> None:
    sampling = replace(LONG, max_tokens=60)
    recorder = Recorder()
    async with engine_of(folder) as engine:
        expected = [await generate(engine, repetitive(seed, 30), sampling) for seed in range(6)]
    async with engine_of(
        folder, recorder, kv_cache_memory=40 * 4 * 512, speculative_config=ON.model_dump()
    ) as engine:
        results = await asyncio.gather(
            *(generate(engine, repetitive(seed, 30), sampling) for seed in range(6))
        )
    for one, other in zip(results, expected, strict=True):
        check_equal(one, other)
    assert sum(step.num_preempted for step in recorder.steps) > 0
    assert recorder.accepted > 0


async def test_a_text_that_goes_on_finds_the_accepted_tokens_in_the_cache(folder: Path) -> None:
    async with engine_of(folder) as engine:
        prompt = repetitive(1)
        text = (*prompt, *drawn(await generate(engine, prompt, LONG, speculation=ON)))
        longer = await generate(engine, (*text, 7), replace(LONG, max_tokens=8))
    # All blocks but the last token's own, which is never read.
    assert longer[0].num_cached_tokens == (len(text) - 1) // 4 * 4
    async with engine_of(folder) as engine:
        check_equal(await generate(engine, (*text, 7), replace(LONG, max_tokens=8)), longer)


async def test_a_request_decides_for_itself(folder: Path) -> None:
    recorder = Recorder()
    async with engine_of(folder, recorder, speculative_config=ON) as engine:
        await generate(engine, repetitive(1), LONG, speculation=OFF)
        assert not recorder.proposed
        await generate(engine, repetitive(1), LONG)
        assert recorder.proposed


async def test_a_grammar_gets_no_proposals(folder: Path) -> None:
    recorder = Recorder()
    async with engine_of(folder, recorder) as engine:
        grammar = GrammarCompiler(engine.tokenizer, 304).compile("regex", "(it was ){8}", "regex")
        outputs = await generate(engine, repetitive(1), LONG, speculation=ON, constraint=grammar.constraint())
    assert "".join(output.text for output in outputs) == "it was " * 8
    assert not recorder.proposed


async def test_a_failed_step_with_proposals_is_computed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two requests each is computed alone, and draws the same numbers."""
    sampling = replace(LONG, temperature=0.3, seed=5)
    async with engine_of(folder) as engine:
        expected = [await generate(engine, repetitive(seed), sampling) for seed in range(2)]
        run, failures = engine._runner.run, []

        def failing(chunks: Any, states: Any) -> Any:
            results = run(chunks, states)
            if len(chunks) == 2 and any(chunk.proposed for chunk in chunks):
                failures.append(chunks)
                raise RuntimeError("out of memory")
            return results

        monkeypatch.setattr(engine._runner, "run", failing)
        got = await asyncio.gather(
            *(generate(engine, repetitive(seed), sampling, speculation=ON) for seed in range(2))
        )
    for one, other in zip(got, expected, strict=True):
        check_equal(one, other)
    assert failures
