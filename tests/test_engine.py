"""The engine as a whole: right answers, the same in any company, and nothing left behind."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from dape_engine.engine import AsyncEngine
from dape_engine.errors import (
    ContextLengthError,
    EngineStoppedError,
    QueueFullError,
    RequestError,
    StepError,
)
from dape_engine.options import EngineOptions
from dape_engine.request import (
    GenerationRequest,
    RequestStats,
    SamplingParams,
    ScoreRequest,
    StepStats,
    Window,
)
from engines import SMALL, drawn, engine_of, generate, score, tokens
from models import plain_logprobs, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


async def test_greedy_generation_equals_repeated_full_forward_passes(folder: Path) -> None:
    prompt = tokens(1, 37)
    async with engine_of(folder) as engine:
        outputs = await generate(engine, prompt)
    sequence = prompt
    for output in outputs:
        expected = plain_logprobs(folder, sequence)[-1]
        assert output.token_ids[0] == int(expected.argmax())
        assert output.logprobs[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
        sequence += output.token_ids
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    "settings",
    [
        {"position": {"kind": "nope"}, "dape": {"width": 4}},
        {"position": {"kind": "alibi"}},
        {"position": {"kind": "fire", "mlp_width": 8, "init_length": 20}, "dape": {"width": 8}},
        {"position": {"kind": "t5"}, "dape": {"width": 8, "form": "add_residual"}},
        {"position": {"kind": "rope", "fraction": 0.5}, "dape": {"width": 8}},
        {"position": {"kind": "cope"}},
        {"position": {"kind": "learned", "max_positions": 128}},
        {"position": {"kind": "sinusoidal"}},
        {"position": {"kind": "sandwich", "dimension": 16}},
        {"position": {"kind": "kerple_power"}, "dape": {"width": 8, "form": "concat"}},
        {"position": {"kind": "kerple"}, "dape": {"version": 2, "width": 8, "kernel": 3}},
        {"position": {"kind": "kerple"}, "dape": {"width": 8}, "parallel_residual": True},
        {"position": {"kind": "alibi"}, "tie_word_embeddings": True},
    ],
    ids=lambda settings: "-".join(
        str(v) for part in settings.values() for v in (part.values() if isinstance(part, dict) else [part])
    ),
)
async def test_every_encoding_scores_as_a_full_forward_pass_does(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_model(tmp_path, max_model_len=128, **settings)
    ids = tokens(2, 61)
    expected = plain_logprobs(folder, ids)
    async with engine_of(folder, max_num_batched_tokens=32) as engine:
        [scored] = await score(engine, ids, Window(0, 61, 1))
    assert scored == pytest.approx([float(expected[i - 1, ids[i]]) for i in range(1, 61)], abs=1e-4)


@pytest.mark.usefixtures("best_cpu")
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("int8", 0.1)])
async def test_a_narrow_cache_moves_the_scores_a_little(folder: Path, dtype: str, tolerance: float) -> None:
    """Blocks take as much less memory, scales included, as there are more of them."""
    ids, window = tokens(2, 61), Window(0, 61, 1)
    async with engine_of(folder, block_size=16, attention_backend="cpu") as engine:
        [wide], blocks = await score(engine, ids, window), engine.num_blocks
    async with engine_of(folder, block_size=16, kv_cache_dtype=dtype, attention_backend="cpu") as engine:
        [narrow] = await score(engine, ids, window)
        assert engine.num_blocks > 1.5 * blocks
    assert narrow != wide
    assert narrow == pytest.approx(wide, abs=tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 33}, {"block_size": 16}, {"attention_workspace": 1 << 20}]
)
async def test_the_answer_does_not_depend_on_company_chunks_or_cache(
    folder: Path, options: dict[str, Any]
) -> None:
    prompt = tokens(3, 83)
    async with engine_of(folder) as engine:
        alone = await generate(engine, prompt)
        scored_alone = await score(engine, prompt, Window(0, 83, 1))
    async with engine_of(folder, **options) as engine:
        company = [generate(engine, tokens(seed, 5 + 17 * seed)) for seed in range(6)]
        company += [generate(engine, prompt[:50] + tokens(seed, 9)) for seed in range(3)]
        together, scored, *_ = await asyncio.gather(
            generate(engine, prompt), score(engine, prompt, Window(0, 83, 1)), *company
        )
        again = await generate(engine, prompt)
        assert again[0].num_cached_tokens > 0
        scored_again = await score(engine, prompt, Window(0, 83, 60))
    for other in (together, again):
        assert drawn(other) == drawn(alone)
        for a, b in zip(alone, other, strict=True):
            assert b.logprobs[0].logprob == pytest.approx(a.logprobs[0].logprob, abs=1e-4)
    assert scored[0] == pytest.approx(scored_alone[0], abs=1e-4)
    assert scored_again[0] == pytest.approx(scored_alone[0][59:], abs=1e-4)


async def test_a_seed_gives_the_same_text_in_any_company(folder: Path) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    prompt = tokens(4, 20)
    async with engine_of(folder) as engine:
        alone = await generate(engine, prompt, sampling)
        company = [generate(engine, tokens(seed, 30), sampling) for seed in range(5)]
        together, *_ = await asyncio.gather(generate(engine, prompt, sampling), *company)
    assert drawn(together) == drawn(alone)


async def test_preempted_requests_give_the_same_answers(folder: Path) -> None:
    prompts = [tokens(seed, 30) for seed in range(6)]
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    observer = Recorder()
    async with engine_of(folder) as engine:
        expected = [drawn(await generate(engine, prompt, sampling)) for prompt in prompts]
    # 2 layers x keys and values x 32 x 4 bytes a token: 40 blocks hold fewer than three whole sequences.
    async with engine_of(folder, observer, kv_cache_memory=40 * 4 * 512) as engine:
        assert engine.num_blocks == 40
        results = await asyncio.gather(*(generate(engine, prompt, sampling) for prompt in prompts))
    assert [drawn(outputs) for outputs in results] == expected
    assert sum(stats.num_preemptions for stats in observer.finished) > 0


async def test_prompt_logprobs_come_with_the_first_output(folder: Path) -> None:
    prompt = tokens(5, 70)
    expected = plain_logprobs(folder, prompt)
    async with engine_of(folder) as engine:
        first, *rest = await generate(engine, prompt, prompt_logprobs=2)
        [only] = await generate(engine, prompt, SamplingParams(max_tokens=0), prompt_logprobs=2)
    for outputs in (first, only):
        logprobs = outputs.prompt_logprobs
        assert logprobs is not None
        assert logprobs[0] is None
        assert [entry.token_id for entry in logprobs if entry] == list(prompt[1:])
        for index, entry in enumerate(logprobs[1:], 1):
            assert entry is not None
            assert entry.logprob == pytest.approx(float(expected[index - 1, prompt[index]]), abs=1e-4)
            assert len(entry.top) == 2
            likelihoods = expected[index - 1]
            assert entry.rank == 1 + int((likelihoods > likelihoods[prompt[index]]).sum())
    assert all(output.prompt_logprobs is None for output in rest)
    assert (only.finish_reason, only.token_ids) == ("length", ())


async def test_windows_come_back_in_order(folder: Path) -> None:
    ids = tokens(6, 100)
    windows = [Window(start, start + 40, start + 1) for start in range(0, 60, 7)]
    async with engine_of(folder) as engine:
        scored = await score(engine, ids, *windows)
        apart = [(await score(engine, ids, window))[0] for window in windows]
    for together, alone in zip(scored, apart, strict=True):
        assert together == pytest.approx(alone, abs=1e-4)


class Recorder:
    """Keeps what the engine reports."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.finished: list[RequestStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_finished(self, stats: RequestStats) -> None:
        self.finished.append(stats)


async def test_a_long_prompt_does_not_stall_a_running_generation(folder: Path) -> None:
    observer = Recorder()
    async with engine_of(folder, observer, max_num_batched_tokens=32) as engine:
        sampling = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
        running = engine.generate(GenerationRequest("short", tokens(1, 4), sampling))
        async with aclosing(running):
            await anext(running)
            begun = len(observer.steps)
            long = asyncio.ensure_future(generate(engine, tokens(2, 400)))
            rest = [output async for output in running]
            await long
    assert len(rest) == 59
    shared = [step for step in observer.steps[begun:] if step.num_prefill_tokens > 0]
    assert len(shared) >= 400 // 32
    stalled = [step for step in shared[:-1] if step.num_generated_tokens == 0]
    assert len(stalled) <= 1


async def test_metrics_count_every_token(folder: Path) -> None:
    observer = Recorder()
    async with engine_of(folder, observer) as engine:
        await generate(engine, tokens(1, 30))
        await score(engine, tokens(2, 50), Window(0, 50, 10))
    generation, scoring = observer.finished
    assert (generation.num_prompt_tokens, generation.num_generated_tokens) == (30, 8)
    assert (scoring.kind, scoring.num_scored_tokens) == ("score", 40)
    assert sum(step.num_generated_tokens for step in observer.steps) == 8
    assert sum(step.num_scored_tokens for step in observer.steps) == 40
    times = generation.times
    assert times.queued <= times.scheduled <= times.first_token <= times.finished  # type: ignore[operator]


async def test_leaving_clients_give_back_their_blocks_at_once(folder: Path) -> None:
    chance = random.Random(11)

    async def visit(engine: AsyncEngine, seed: int) -> None:
        long = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
        if chance.random() < 0.3:
            stream: Any = engine.score(
                ScoreRequest("s", tokens(seed, 90), (Window(0, 90, 1), Window(9, 80, 70)))
            )
        else:
            stream = engine.generate(GenerationRequest("g", tokens(seed, chance.randrange(1, 120)), long))
        async with aclosing(stream):
            for _ in range(chance.randrange(0, 4)):
                await anext(stream, None)

    async with engine_of(folder, kv_cache_memory=80 * 4 * 512) as engine:
        await asyncio.gather(*(visit(engine, seed) for seed in range(60)))
        assert engine.state().free_blocks == engine.num_blocks
        assert drawn(await generate(engine, tokens(1, 20)))


async def test_a_cancelled_task_gives_back_its_blocks(folder: Path) -> None:
    async with engine_of(folder) as engine:
        tasks = [asyncio.ensure_future(generate(engine, tokens(seed, 400))) for seed in range(4)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_a_failed_step_ends_its_requests_and_no_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_of(folder) as engine:
        expected = drawn(await generate(engine, tokens(1, 20)))
        run = engine._runner.run
        monkeypatch.setattr(engine._runner, "run", _fail_once(run))
        with pytest.raises(StepError, match="RuntimeError"):
            await generate(engine, tokens(2, 20))
        assert drawn(await generate(engine, tokens(1, 20))) == expected
        assert engine.state().failure is None


def _fail_once(run: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(1000))

    def failing(*arguments: Any) -> Any:
        if next(calls) == 0:
            raise RuntimeError("out of memory")
        return run(*arguments)

    return failing


async def test_a_full_queue_refuses_with_a_time_to_retry(folder: Path) -> None:
    async with engine_of(folder, max_num_seqs=1, max_num_queued_reqs=2) as engine:
        tasks = [asyncio.ensure_future(generate(engine, tokens(seed, 300))) for seed in range(8)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if isinstance(result, QueueFullError)]
    assert 1 <= len(refused) <= 6
    assert all(error.retry_after >= 1 and "max_num_queued_reqs" in error.message for error in refused)
    assert all(len(drawn(result)) == 8 for result in results if isinstance(result, list))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "named"),
    [
        ((), 4, RequestError, "empty"),
        ((1, 304), 4, RequestError, "304"),
        ((-1,), 4, RequestError, "-1"),
        (tuple([5] * 509), 4, ContextLengthError, "512"),
        (tuple([5] * 513), 1, ContextLengthError, "512"),
    ],
)
async def test_wrong_requests_are_refused_with_the_numbers(
    folder: Path, prompt: tuple[int, ...], max_tokens: int, error: type[Exception], named: str
) -> None:
    async with engine_of(folder) as engine:
        with pytest.raises(error, match=named):
            await generate(engine, prompt, SamplingParams(max_tokens=max_tokens))
        full = await generate(engine, tuple([5] * 508), SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(drawn(full)) == 4


async def test_shutdown_finishes_what_it_can_and_tells_the_rest(folder: Path) -> None:
    engine = AsyncEngine(folder, EngineOptions(**SMALL))
    engine.start()
    short = asyncio.ensure_future(generate(engine, tokens(1, 5)))
    await asyncio.sleep(0)
    await engine.shutdown(60)
    assert len(drawn(await short)) == 8
    with pytest.raises(EngineStoppedError):
        await generate(engine, tokens(1, 5))

    engine = AsyncEngine(folder, EngineOptions(**SMALL))
    engine.start()
    long = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    endless = asyncio.ensure_future(generate(engine, tokens(1, 100), long))
    await asyncio.sleep(0)
    await engine.shutdown(0)
    with pytest.raises(EngineStoppedError):
        await endless
    assert engine.state().free_blocks == engine.num_blocks


async def test_stop_strings_end_the_text_before_them(folder: Path) -> None:
    async with engine_of(folder) as engine:
        prompt = tokens(1, 20)
        plain = "".join(output.text for output in await generate(engine, prompt))
        middle = plain[len(plain) // 2 :][:2]
        outputs = await generate(
            engine, prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop=(middle,))
        )
    text = "".join(output.text for output in outputs)
    assert text == plain[: plain.find(middle)]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", middle)


async def test_every_token_of_a_text_of_full_length_gets_a_finite_score(folder: Path) -> None:
    async with engine_of(folder) as engine:
        [scored] = await score(engine, tokens(9, 512), Window(0, 512, 1))
    assert len(scored) == 511
    assert all(math.isfinite(value) and value < 0 for value in scored)
