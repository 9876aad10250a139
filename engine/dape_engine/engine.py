"""The engine as its users see it: asynchronous generation and scoring over one thread of steps.

Requests enter and leave under one lock that is held only while the scheduler decides, never while the
model runs, so submitting, refusing and aborting never wait for a step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Protocol

import torch

from dape_engine.cache import BlockPool
from dape_engine.errors import (
    ContextLengthError,
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
from dape_engine.scheduler import Scheduler, Step
from dape_engine.sequence import Sequence
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config, load_model

logger = logging.getLogger(__name__)


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
            self._fail_all(EngineStoppedError("the engine has stopped before the request was finished"))
            self._work.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def state(self) -> EngineState:
        """Return a snapshot without waiting for the engine."""
        busy = bool(self._jobs)
        return EngineState(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            free_blocks=self._pool.num_free,
            total_blocks=self.num_blocks,
            cached_blocks=self._pool.num_cached,
            steps=self._steps,
            seconds_since_progress=time.monotonic() - self._progress if busy else 0.0,
            stopped=self._draining or not self._thread.is_alive(),
            failure=self._failure,
        )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationOutput]:
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
        async for item in self._drive(GenerationJob(request, self.tokenizer)):
            if isinstance(item, GenerationOutput):
                yield item

    async def score(self, request: ScoreRequest) -> AsyncIterator[WindowScores]:
        """Yield the scores of each window, in order; closing the iterator aborts the request.

        Raises: as `generate`.
        """
        self._check_tokens(request.token_ids)
        for window in request.windows:
            if not 0 <= window.start < window.score_from < window.end <= len(request.token_ids):
                raise RequestError(f"{window} does not fit an input of {len(request.token_ids)} tokens")
            if window.end - window.start > self.max_model_len:
                raise ContextLengthError(
                    f"a window of {window.end - window.start} tokens is above the limit of {self.max_model_len}",
                    param="context_length",
                )
        async for item in self._drive(ScoreJob(request)):
            if isinstance(item, WindowScores):
                yield item

    def _check_tokens(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise RequestError("the input is empty; at least 1 token is needed", param="prompt")
        vocab = self.config.vocab_size
        for token in token_ids:
            if not 0 <= token < vocab:
                raise RequestError(f"token id {token} is outside 0 to {vocab - 1}", param="prompt")

    async def _drive(self, job: Job) -> AsyncIterator[object]:
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
            if self._draining or not self._thread.is_alive():
                raise EngineStoppedError(self._failure or "the server is shutting down")
            for sequence in job.next_sequences():
                self._scheduler.add(sequence)
                self._jobs[sequence] = job
            self._work.notify()

    def _abort(self, job: Job) -> None:
        with self._lock:
            if job.finish_reason is not None:
                return
            job.finish_reason = "abort"
            self._release(job)
        self._report(job)

    def _release(self, job: Job) -> None:
        """Give back everything an unfinished job holds."""
        for sequence in job.sequences:
            if self._jobs.pop(sequence, None) is not None:
                self._scheduler.abort(sequence)

    def _fail(self, jobs: Iterable[Job], error: DapeError) -> None:
        for job in jobs:
            job.finish_reason = "abort"
            self._release(job)
            job.mailbox.close(error)
            self._report(job)

    def _report(self, job: Job) -> None:
        if self._observer is not None:
            job.mark(finished=time.monotonic())
            self._observer.on_finished(job.stats())

    def _run(self) -> None:
        """Run steps until the engine stops: the body of the engine's thread."""
        try:
            while True:
                with self._lock:
                    while not self._jobs and not self._stopping:
                        self._progress = time.monotonic()
                        self._work.wait()
                    if self._stopping:
                        return
                    step = self._scheduler.schedule()
                self._execute(step)
        except BaseException as error:
            # Only a defect leads here: say so in /health and answer everyone who waits.
            logger.exception("the engine has failed")
            self._failure = f"the engine has failed: {type(error).__name__}"
            with self._lock:
                self._fail(set(self._jobs.values()), EngineStoppedError(self._failure))
            raise

    def _execute(self, step: Step) -> None:
        """Run one step and hand its results to the jobs."""
        started = time.monotonic()
        with self._lock:
            states = self._begin(step, started)
        try:
            results = self._runner.run(step.chunks, states)
        except Exception as error:
            logger.exception("a step has failed")
            jobs = {self._jobs[c.sequence] for c in step.chunks if c.sequence in self._jobs}
            with self._lock:
                self._fail(jobs, StepError(f"the model failed on this request: {type(error).__name__}"))
            return
        with self._lock:
            touched = self._apply(step, results)
        for job in touched:
            job.mailbox.flush()
            if job.finish_reason is not None:
                self._report(job)
        self._steps += 1
        self._progress = time.monotonic()
        if self._observer is not None:
            self._observer.on_step(_step_stats(step, results, touched, self._progress - started))

    def _begin(self, step: Step, now: float) -> dict[Sequence, SamplerState]:
        """Note which requests begin, and return the sampler states of those that generate."""
        states = {}
        for chunk in step.chunks:
            job = self._jobs[chunk.sequence]
            job.begin(chunk.sequence, now)
            if isinstance(job, GenerationJob):
                states[chunk.sequence] = job.state
        return states

    def _apply(self, step: Step, results: list[ChunkResult]) -> list[Job]:
        """Commit a step and let every job take its results; return the jobs that did."""
        self._scheduler.commit(step)
        touched: dict[Job, None] = {}
        for chunk, result in zip(step.chunks, results, strict=True):
            job = self._jobs.get(chunk.sequence)
            if job is None:
                continue  # aborted while the model ran
            touched[job] = None
            if job.advance(chunk.sequence, result):
                self._scheduler.finish(chunk.sequence)
                del self._jobs[chunk.sequence]
                for sequence in job.next_sequences():
                    self._scheduler.add(sequence)
                    self._jobs[sequence] = job
        return list(touched)


def _device(options: EngineOptions) -> torch.device:
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise SettingsError("device: cuda was asked for, but PyTorch sees no CUDA device")
    return torch.device("cuda" if options.device != "cpu" and available else "cpu")


def _dtype(options: EngineOptions, stored: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights in memory: on a CPU float32, exact and no slower here."""
    name = options.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else stored
    dtype: torch.dtype = getattr(torch, name)
    return dtype
