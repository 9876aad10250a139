"""Deadlines, tenants, kept log-probabilities and progress, in an engine with a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dape_engine.errors import DeadlineError, QueueFullError, StepError
from dape_engine.loop import FAILED_STEPS
from dape_engine.request import (
    TIMED_OUT,
    GenerationRequest,
    SamplingParams,
    Scheduling,
    ScoreRequest,
    Window,
    WindowScores,
)
from engines import GREEDY, drawn, engine_of, generate, tokens
from models import plain_logprobs, write_model

LONG = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


async def whole(engine: Any, ids: tuple[int, ...], **more: Any) -> WindowScores:
    (scores,) = [s async for s in engine.score(ScoreRequest("s", ids, (Window(0, len(ids), 1),), **more))]
    return scores


class TestKeptLogProbabilities:
    async def test_a_text_scored_twice_has_the_same_numbers_and_is_computed_once(self, folder: Path) -> None:
        async with engine_of(folder) as engine:
            first = await whole(engine, tokens(1, 103), top_logprobs=2)
            again = await whole(engine, tokens(1, 103), top_logprobs=2)
        assert again.logprobs == first.logprobs
        assert again.top == first.top
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 96)

    async def test_answers_after_a_shared_context_equal_the_uncached_ones(self, folder: Path) -> None:
        context = tokens(2, 90)
        texts = [(*context, *tokens(10 + answer, 7)) for answer in range(4)]
        async with engine_of(folder) as engine:
            cached = [await whole(engine, text) for text in texts]
            alone = [
                await whole(engine, text, scheduling=Scheduling(1, cache_salt=str(number)))
                for number, text in enumerate(texts)
            ]
        assert [scores.num_cached_tokens for scores in cached] == [0, 84, 84, 84]
        assert [scores.num_cached_tokens for scores in alone] == [0] * 4
        for one, other in zip(cached, alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)

    async def test_echo_takes_what_scoring_has_kept(self, folder: Path) -> None:
        prompt = tokens(3, 61)
        async with engine_of(folder) as engine:
            scored = await whole(engine, prompt, top_logprobs=1)
            outputs = await generate(engine, prompt, GREEDY, prompt_logprobs=1)
        entries = outputs[0].prompt_logprobs
        assert entries is not None
        assert entries[0] is None
        assert tuple(entry.logprob for entry in entries[1:] if entry) == scored.logprobs
        assert outputs[0].num_cached_tokens == 56
        likelihoods = plain_logprobs(folder, prompt)[:-1]
        own = likelihoods.gather(1, torch.tensor(prompt[1:])[:, None])
        assert [entry.rank for entry in entries[1:] if entry] == (1 + (likelihoods > own).sum(-1)).tolist()

    async def test_more_alternatives_than_are_kept_are_computed(self, folder: Path) -> None:
        async with engine_of(folder) as engine:
            narrow = await whole(engine, tokens(1, 40))
            wide = await whole(engine, tokens(1, 40), top_logprobs=3)
        assert wide.num_cached_tokens == 0
        assert {len(top) for top in wide.top} == {3}
        assert wide.logprobs == pytest.approx(narrow.logprobs, abs=1e-4)


class TestDeadlines:
    async def test_a_text_ends_at_its_deadline_with_what_there_is(self, folder: Path) -> None:
        async with engine_of(folder) as engine:
            request = GenerationRequest("r", tokens(1, 5), LONG, scheduling=Scheduling(deadline=0.0))
            (output,) = [output async for output in engine.generate(request)]
            assert (output.finish_reason, output.stop_reason) == ("length", TIMED_OUT)

            stream = engine.generate(
                GenerationRequest(
                    "r", tokens(1, 5), LONG, scheduling=Scheduling(deadline=time.monotonic() + 60)
                )
            )
            begun = [await anext(stream)]
            (job,) = set(engine._jobs.values())
            with engine._lock:
                engine._next_deadline = time.monotonic()
                job.scheduling = Scheduling(deadline=engine._next_deadline)
            outputs = begun + [output async for output in stream]
        assert outputs[-1].stop_reason == TIMED_OUT
        assert 1 <= len(drawn(outputs)) < 100

    async def test_scores_and_echoes_are_whole_or_an_error(self, folder: Path) -> None:
        late = Scheduling(deadline=0.0)
        async with engine_of(folder) as engine:
            with pytest.raises(DeadlineError):
                await whole(engine, tokens(1, 40), scheduling=late)
            with pytest.raises(DeadlineError):
                await generate(engine, tokens(1, 40), GREEDY, prompt_logprobs=0, scheduling=late)
            assert drawn(await generate(engine, tokens(1, 4)))


async def test_progress_counts_the_prompt_up_to_its_end(folder: Path) -> None:
    async with engine_of(folder, max_num_batched_tokens=32) as engine:
        await generate(engine, tokens(1, 20))
        outputs = await generate(engine, (*tokens(1, 20), *tokens(2, 80)), report_progress=True)
    progress = [output.progress for output in outputs if output.progress]
    assert [(p.cached, p.processed, p.total) for p in progress] == [(20, done, 100) for done in (52, 84, 100)]
    assert [p.seconds for p in progress] == sorted(p.seconds for p in progress)
    assert len(drawn(outputs)) == 8


async def test_a_refused_client_hears_a_time_that_grows_with_the_queue(folder: Path) -> None:
    async with engine_of(folder, max_num_seqs=1, max_num_queued_reqs=2) as engine:
        await generate(engine, tokens(1, 20))
        engine._pace._recent_seconds = 0.5 * engine._pace._recent_rows
        tasks = [asyncio.ensure_future(generate(engine, tokens(seed, 20), LONG)) for seed in range(5)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if isinstance(result, QueueFullError)]
    assert 2 <= len(refused) <= 3
    # Two requests of 119 rows wait; half of them take 59.5 s.
    assert {error.retry_after for error in refused} == {60}


async def test_a_crowd_of_one_tenant_does_not_hold_up_another(folder: Path) -> None:
    async with engine_of(folder, max_num_seqs=2) as engine:
        greedy = Scheduling(1, tenant="greedy")
        crowd = [
            asyncio.ensure_future(whole(engine, tokens(seed, 200), scheduling=greedy)) for seed in range(40)
        ]
        await asyncio.sleep(0)
        chat = Scheduling(tenant="chat")
        assert len(drawn(await generate(engine, tokens(99, 10), scheduling=chat))) == 8
        assert sum(task.done() for task in crowd) <= 10
        await asyncio.gather(*crowd)


def failing_for(run: Callable[..., Any], prompt: tuple[int, ...]) -> Callable[..., Any]:
    def fail(chunks: Any, states: Any) -> Any:
        if any(chunk.sequence.tokens[:3] == list(prompt[:3]) for chunk in chunks):
            raise MemoryError
        return run(chunks, states)

    return fail


async def test_the_fault_of_one_request_ends_no_other_in_the_same_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1, seed=5, ignore_eos=True)
    good, bad = tokens(1, 20), tokens(2, 20)
    async with engine_of(folder) as engine:
        expected = drawn(await generate(engine, good, sampling))
        monkeypatch.setattr(engine._runner, "run", failing_for(engine._runner.run, bad))
        fine, failed = await asyncio.gather(
            generate(engine, good, sampling), generate(engine, bad, sampling), return_exceptions=True
        )
        assert isinstance(failed, StepError)
        assert "MemoryError" in failed.message
        assert not isinstance(fine, BaseException)
        assert drawn(fine) == expected
        assert engine.state().failure is None


async def test_an_engine_whose_steps_all_fail_says_so_until_one_succeeds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_of(folder) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "run", failing_for(engine._runner.run, tokens(1, 20)))
            for _ in range(FAILED_STEPS):
                assert engine.state().failure is None
                with pytest.raises(StepError):
                    await generate(engine, tokens(1, 20))
            assert engine.state().failure == "the last 3 steps have failed"
        await generate(engine, tokens(1, 20))
        assert engine.state().failure is None


class TestPieces:
    WINDOWS = (Window(0, 100, 1), Window(50, 103, 101), Window(3, 90, 60))

    async def pieces(self, engine: Any, ids: tuple[int, ...]) -> list[WindowScores]:
        request = ScoreRequest("s", ids, self.WINDOWS, top_logprobs=1, in_pieces=True)
        return [piece async for piece in engine.score(request)]

    async def test_pieces_of_windows_join_to_the_whole(self, folder: Path) -> None:
        ids = tokens(1, 103)
        async with engine_of(folder, max_num_batched_tokens=32) as engine:
            whole = [s async for s in engine.score(ScoreRequest("s", ids, self.WINDOWS, top_logprobs=1))]
        for kv_cache_memory in (1 << 20, 30 * 4 * 512):
            async with engine_of(
                folder, max_num_batched_tokens=32, kv_cache_memory=kv_cache_memory
            ) as engine:
                left = await self.pieces(engine, ids)
                again = await self.pieces(engine, ids)
            assert len(left) > len(self.WINDOWS)
            for found in (left, again):
                for window, scores in zip(self.WINDOWS, whole, strict=True):
                    self.check(window, scores, found)
                assert not found

    @staticmethod
    def check(window: Window, scores: WindowScores, left: list[WindowScores]) -> None:
        """Take the pieces of one window off the list."""
        logprobs: list[float] = []
        ends = [window.start]
        while ends[-1] < window.end:
            piece = left.pop(0)
            assert piece.window.start == window.start
            assert piece.window.score_from == min(max(window.score_from, ends[-1]), piece.window.end)
            assert len(piece.logprobs) == len(piece.top) == piece.window.end - piece.window.score_from
            ends.append(piece.window.end)
            logprobs += piece.logprobs
        assert ends == sorted(set(ends))
        assert logprobs == pytest.approx(scores.logprobs, abs=1e-4)
