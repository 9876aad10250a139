"""The engine as its users see it: asynchronous generation and scoring over one thread of steps.

Requests enter and leave under one lock that is held only while the scheduler decides, never while the
model runs, so submitting, refusing and aborting never wait for a step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Protocol, cast

import torch

from dape_engine.cache import BlockPool
from dape_engine.errors import (
    ContextLengthError,
    DapeError,
    EngineStoppedError,
    RequestError,
    SettingsError,
    StepError,
)
from dape_engine.jobs import GenerationJob, Job, ScoreJob
from dape_engine.options import EngineOptions
from dape_engine.request import (
    EngineState,
    GenerationOutput,
    GenerationRequest,
    RequestStats,
    ScoreRequest,
    StepStats,
    WindowScores,
)
from dape_engine.runner import ChunkResult, ModelRunner
from dape_engine.sampling import SamplerState
from dape_engine.scheduler import Scheduler, Step
from dape_engine.sequence import Sequence
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config, load_model

logger = logging.getLogger(__name__)
STOP_SECONDS = 30
"""Longest wait for the step under way when the engine stops."""


class Observer(Protocol):
    """Receives facts for metrics, from the engine's thread."""

    def on_step(self, stats: StepStats) -> None:
        """Called after every step."""

    def on_finished(self, stats: RequestStats) -> None:
        """Called when a request has finished or was aborted."""


class AsyncEngine:
    """One model, one cache, one scheduler, one thread of steps.

    Raises:
        ModelFolderError: the model folder is missing, damaged or inconsistent.
        SettingsError: the options do not fit the model or the machine.
    """

    def __init__(self, folder: Path, options: EngineOptions, observer: Observer | None = None):
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.options = options
        self.model_name = folder.resolve().name
        self.config = load_config(folder)
        self.tokenizer = TextTokenizer.load(folder, self.config)
        device = _device(options)
        model = load_model(folder, _dtype(options, self.config.dtype, device), device)
        self.max_model_len = options.max_model_len or self.config.max_model_len
        if self.max_model_len > self.config.max_model_len:
            raise SettingsError(
                f"max_model_len: {self.max_model_len} is above the model's {self.config.max_model_len}"
            )
        self._runner = ModelRunner(model, options, self.max_model_len)
        self.backend_name = self._runner.backend.name
        self.num_blocks = self._runner.num_blocks
        self.block_size = options.block_size
        self.max_model_len = min(self.max_model_len, self.num_blocks * self.block_size)
        self._pool = BlockPool(self.num_blocks, self.block_size)
        self._scheduler = Scheduler(
            self._pool,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_queued_reqs=options.max_num_queued_reqs,
        )
        self._observer = observer
        self._jobs: dict[Sequence, Job] = {}
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._draining = False
        self._stopping = False
        self._failure: str | None = None
        self._steps = 0
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="dape-engine", daemon=True)

    def start(self) -> None:
        """Start the thread of steps."""
        self._thread.start()

    async def shutdown(self, drain_seconds: float) -> None:
        """Refuse new requests, finish the running ones until the deadline, abort the rest, stop."""
        with self._lock:
            self._draining = True
        deadline = time.monotonic() + drain_seconds
        while self._jobs and self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with self._lock:
            self._stopping = True
            stopped = EngineStoppedError("the server has stopped before the request was finished")
            self._fail(set(self._jobs.values()), stopped)
            self._work.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    def state(self) -> EngineState:
        """Return a snapshot without waiting for a step."""
        with self._lock:
            return EngineState(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                free_blocks=self._pool.num_free,
                total_blocks=self.num_blocks,
                cached_blocks=self._pool.num_cached,
                steps=self._steps,
                seconds_since_progress=time.monotonic() - self._progress if self._jobs else 0.0,
                stopped=self._draining or not self._thread.is_alive(),
                failure=self._failure,
            )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """Yield the outputs of one completion; closing the iterator aborts the request.

        Raises:
            RequestError: the prompt is empty or holds an unknown token id.
            ContextLengthError: prompt and max_tokens are longer than the engine allows.
            QueueFullError, EngineStoppedError, StepError: see `dape_engine.errors`.
        """
        self._check_tokens(request.prompt)
        total = len(request.prompt) + request.sampling.max_tokens
        if total > self.max_model_len:
            raise ContextLengthError(
                f"prompt ({len(request.prompt)} tokens) plus max_tokens ({request.sampling.max_tokens}) "
                f"is {total} tokens, above the limit of {self.max_model_len}",
                param="max_tokens" if len(request.prompt) < self.max_model_len else "prompt",
            )
        job = GenerationJob(request, self.tokenizer, self.config.vocab_size)
        async with aclosing(self._drive(job)) as items:
            async for item in items:
                yield cast("GenerationOutput", item)

    async def score(self, request: ScoreRequest) -> AsyncGenerator[WindowScores, None]:
        """Yield the scores of each window, in order; closing the iterator aborts the request.

        Raises: as `generate`.
        """
        self._check_tokens(request.token_ids)
        for window in request.windows:
            if not 0 <= window.start < window.score_from < window.end <= len(request.token_ids):
                raise RequestError(f"{window} does not fit an input of {len(request.token_ids)} tokens")
            if window.end - window.start > self.max_model_len:
                raise ContextLengthError(
                    f"a window of {window.end - window.start} tokens is above "
                    f"the limit of {self.max_model_len}",
                    param="context_length",
                )
        async with aclosing(self._drive(ScoreJob(request))) as items:
            async for item in items:
                yield cast("WindowScores", item)

    def _check_tokens(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise RequestError("the input is empty; at least 1 token is needed", param="prompt")
        vocab = self.config.vocab_size
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < vocab:
                raise RequestError(f"token id {token} is outside 0 to {vocab - 1}", param="prompt")

    async def _drive(self, job: Job) -> AsyncGenerator[object, None]:
        """Submit a job, yield its items until it has finished, and abort it if the client leaves."""
        self._submit(job)
        try:
            while (item := await job.mailbox.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._abort(job)

    def _submit(self, job: Job) -> None:
        with self._lock:
            if not self._jobs:
                self._progress = time.monotonic()
            if self._draining or not self._thread.is_alive():
                raise EngineStoppedError(self._failure or "the server is shutting down")
            for place, sequence in enumerate(job.next_sequences()):
                self._scheduler.add(sequence, accepted=place > 0)
                self._jobs[sequence] = job
            self._work.notify()

    def _abort(self, job: Job) -> None:
        """End a job whose client has left; nothing happens if it has finished."""
        with self._lock:
            if job.finish_reason is None:
                self._fail([job], None)

    def _fail(self, jobs: Iterable[Job], error: DapeError | None) -> None:
        """End jobs before their time, giving back all they hold; the lock is held."""
        for job in jobs:
            for sequence in job.sequences:
                if self._jobs.pop(sequence, None) is not None:
                    self._scheduler.finish(sequence)
            job.finish("abort", error)
            job.mailbox.flush()
            self._report(job)

    def _report(self, job: Job) -> None:
        job.mark(finished=time.monotonic())
        if self._observer is not None:
            self._observer.on_finished(job.stats())

    def _run(self) -> None:
        """Run steps until the engine stops: the body of the engine's thread."""
        try:
            while self._step():
                pass
        except BaseException as error:
            # Only a defect leads here: say so in the state and answer everyone who waits.
            self._failure = f"the engine has failed: {type(error).__name__}"
            logger.exception("the engine has failed")
            with self._lock:
                self._fail(set(self._jobs.values()), EngineStoppedError(self._failure))

    def _step(self) -> bool:
        """Wait for work and do one step of it; return False when the engine is to stop."""
        with self._lock:
            self._work.wait_for(lambda: self._jobs or self._stopping)
            if self._stopping:
                return False
            started = time.monotonic()
            step = self._scheduler.schedule()
            states = self._begin(step, started)
        try:
            results = self._runner.run(step.chunks, states)
        except Exception as error:
            logger.exception("a step has failed")
            with self._lock:
                jobs = {self._jobs[c.sequence] for c in step.chunks if c.sequence in self._jobs}
                self._fail(jobs, StepError(f"the model failed on this request: {type(error).__name__}"))
            return True
        with self._lock:
            gaps = self._apply(step, results, time.monotonic())
        self._steps += 1
        self._progress = time.monotonic()
        if self._observer is not None:
            self._observer.on_step(_step_stats(step, results, gaps, self._progress - started))
        return True

    def _begin(self, step: Step, now: float) -> dict[Sequence, SamplerState]:
        """Note which requests begin, and return the sampler states of those that generate."""
        states = {}
        for chunk in step.chunks:
            job = self._jobs[chunk.sequence]
            job.begin(chunk.sequence, now)
            if isinstance(job, GenerationJob):
                states[chunk.sequence] = job.state
        return states

    def _apply(self, step: Step, results: list[ChunkResult], now: float) -> list[float]:
        """Commit a step and let every job take its results; return the times between tokens."""
        self._scheduler.commit(step)
        gaps = []
        touched: dict[Job, None] = {}
        for chunk, result in zip(step.chunks, results, strict=True):
            job = self._jobs.get(chunk.sequence)
            if job is None:
                continue  # aborted while the model ran
            touched[job] = None
            if result.sampled is not None and (gap := job.token_gap(now)) is not None:
                gaps.append(gap)
            if job.advance(chunk.sequence, result):
                self._scheduler.finish(chunk.sequence)
                del self._jobs[chunk.sequence]
                job.num_preemptions += chunk.sequence.num_preemptions
                for sequence in job.next_sequences():
                    self._scheduler.add(sequence, accepted=True)
                    self._jobs[sequence] = job
        for job in touched:
            job.mailbox.flush()
            if job.finish_reason is not None:
                self._report(job)
        return gaps


def _step_stats(step: Step, results: list[ChunkResult], gaps: list[float], seconds: float) -> StepStats:
    rows = sum(chunk.count for chunk in step.chunks)
    generated = sum(result.sampled is not None for result in results)
    return StepStats(
        seconds=seconds,
        num_tokens=rows,
        num_prefill_tokens=sum(c.count for c in step.chunks if c.start < c.sequence.prompt_length),
        num_generated_tokens=generated,
        num_scored_tokens=sum(len(result.scored) for result in results),
        num_preempted=len(step.preempted),
        prefix_queries=step.prefix_queries,
        prefix_hits=step.prefix_hits,
        inter_token_seconds=tuple(gaps),
    )


def _device(options: EngineOptions) -> torch.device:
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise SettingsError("device: cuda was asked for, but PyTorch sees no CUDA device")
    return torch.device("cuda" if options.device != "cpu" and available else "cpu")


def _dtype(options: EngineOptions, stored: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights in memory: on a CPU float32, exact and no slower here."""
    automatic = "float32" if device.type == "cpu" else stored
    dtype: torch.dtype = getattr(torch, automatic if options.dtype == "auto" else options.dtype)
    return dtype
