"""The thread of steps: takes jobs in, runs the model for them step by step, hands their results out.

Requests enter and leave under one lock that is held only while the scheduler decides, never while the
model runs, so submitting, refusing and aborting never wait for a step.

While anything decodes, the chunks of background work do not hold up a step: they become a `Flight`, which
goes through the model a few layers at a time between the steps of the others.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from dape_engine.errors import DapeError, EngineStoppedError, QueueFullError, StepError
from dape_engine.inspection import InspectionJob
from dape_engine.jobs import GenerationJob, Job, Mailbox
from dape_engine.pacing import Pace
from dape_engine.request import RequestStats, StepStats
from dape_engine.runner import ModelRunner
from dape_engine.sampling import SamplerState
from dape_engine.scheduler import Scheduler
from dape_engine.sequence import Sequence
from dape_engine.speculation import Speculator
from dape_engine.step import Chunk, ChunkResult, Pass, Step, pairs

logger = logging.getLogger(__name__)
FAILED_STEPS = 3
"""Steps in a row without any success after which the engine calls itself failed."""


class Observer(Protocol):
    """Receives facts for metrics, from the engine's thread."""

    def on_step(self, stats: StepStats) -> None:
        """Called after every step."""

    def on_finished(self, stats: RequestStats) -> None:
        """Called when a request has finished or was aborted, in the context that submitted it."""


@dataclass(slots=True)
class Flight:
    """Chunks of background work on their way through the layers of the model."""

    chunks: list[Chunk]
    states: dict[Sequence, SamplerState]
    work: Pass
    seconds: float = 0.0
    """Spent on it so far."""

    @property
    def is_intact(self) -> bool:
        """Whether all sequences still hold the blocks that are written to."""
        return all(chunk.sequence.flight is chunk for chunk in self.chunks)


class StepLoop:
    """One scheduler, one runner and the thread that drives both."""

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, speculator: Speculator, observer: Observer | None
    ):
        self._scheduler = scheduler
        self._speculator = speculator
        self._runner = runner
        self._observer = observer
        self._pace = Pace()
        self._jobs: dict[Sequence, Job] = {}
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._draining = False
        self._stopping = False
        self._failure: str | None = None
        self._failed_steps = 0
        self._next_deadline = math.inf
        self._steps = 0
        self._progress = time.monotonic()
        self._flight: Flight | None = None
        self._thread = threading.Thread(target=self._run, name="dape-engine", daemon=True)

    @property
    def _trouble(self) -> str | None:
        """What is wrong with the engine, if anything."""
        failed = self._failed_steps
        return self._failure or (f"the last {failed} steps have failed" if failed >= FAILED_STEPS else None)

    def _submit(self, job: Job) -> None:
        with self._lock:
            if not self._jobs:
                self._progress = time.monotonic()
            if self._draining or not self._thread.is_alive():
                raise EngineStoppedError(self._failure or "the server is shutting down")
            try:
                for place, sequence in enumerate(job.next_sequences()):
                    self._scheduler.add(sequence, accepted=place > 0)
                    self._jobs[sequence] = job
            except QueueFullError as error:
                error.retry_after = self._pace.wait(self._scheduler.waiting_tokens)
                raise
            if job.scheduling.deadline is not None:
                self._next_deadline = min(self._next_deadline, job.scheduling.deadline)
            self._work.notify()

    def _abort(self, job: Job) -> None:
        """End a job whose client has left; nothing happens if it has finished."""
        with self._lock:
            if job.finish_reason is None:
                self._fail([job], None)

    def _fail(self, jobs: Iterable[Job], error: DapeError | None) -> None:
        """End jobs before their time, giving back all they hold; the lock is held."""
        for job in jobs:
            job.finish("abort", error)
            self._release(job)

    def _release(self, job: Job) -> None:
        """Give back what a job that was ended holds, and tell its client; the lock is held."""
        for sequence in job.sequences:
            if self._jobs.pop(sequence, None) is not None:
                self._scheduler.finish(sequence)
        Mailbox.flush([job.mailbox])
        self._report(job)

    def _expire(self, now: float) -> None:
        """End the jobs whose deadline has passed at `now`; the lock is held."""
        if now < self._next_deadline:
            return
        for job in set(self._jobs.values()):
            if job.scheduling.deadline is not None and job.scheduling.deadline <= now:
                job.expire()
                self._release(job)
        deadlines = (job.scheduling.deadline for job in self._jobs.values())
        self._next_deadline = min((d for d in deadlines if d is not None), default=math.inf)

    def _report(self, job: Job) -> None:
        job.mark(finished=time.monotonic())
        if self._observer is not None:
            with _logged():
                job.context.run(self._observer.on_finished, job.stats())

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
            self._expire(started)
            if not self._jobs:
                return True
            step = self._scheduler.schedule(self._pace.background_pairs(self._runner.num_layers, started))
            planned = self._speculator.extend(step.chunks)
            decoding = any(chunk.sequence.is_decoding for chunk in planned)
            ahead, behind = _split(planned) if decoding else (planned, [])
            states = self._begin(planned, started)
        computing = time.monotonic()
        results = self._compute(ahead, states)
        computed = time.monotonic()
        model_seconds = computed - computing
        self._pace.observe(ahead, computed - started, computed)
        self._speculator.observe(ahead, computed - started)
        gaps = self._apply(ahead, results)
        flying = time.monotonic()
        landed, landed_results = self._fly(behind, states, hurry=not decoding)
        model_seconds += time.monotonic() - flying
        self._apply(landed, landed_results)
        self._steps += 1
        self._progress = time.monotonic()
        chunks, results = [*ahead, *landed], [*results, *landed_results]
        self._pace.note(sum(chunk.count for chunk in chunks), self._progress - started)
        if self._observer is not None:
            seconds = (self._progress - started, model_seconds)
            with _logged():
                self._observer.on_step(_step_stats(step, chunks, results, gaps, *seconds))
        return True

    def _compute(self, chunks: list[Chunk], states: dict[Sequence, SamplerState]) -> list[ChunkResult]:
        """Run the model; where that fails, on each chunk alone, so that one request's fault ends no other."""
        if not chunks:
            return []
        try:
            return self._runner.run(chunks, states)
        except Exception as error:
            known = error.message if isinstance(error, StepError) else None
            reason = known or type(error).__name__
            # Where in the code it came from is of use for defects only.
            logger.error("a step of %d requests has failed: %s", len(chunks), reason, exc_info=known is None)
            if len(chunks) == 1:
                return [ChunkResult(error=StepError(f"the model failed on this request: {reason}"))]
        return [result for chunk in chunks for result in self._compute([chunk], states)]

    def _fly(
        self, behind: list[Chunk], states: dict[Sequence, SamplerState], *, hurry: bool
    ) -> tuple[list[Chunk], list[ChunkResult]]:
        """Take background work a few layers further; return the chunks that have landed and their results.

        Args:
            behind: chunks that take off now, if none are under way.
            states: sampler states of their sequences.
            hurry: nobody waits for the next step, so go through all layers.
        """
        flight, self._flight = self._flight, None
        try:
            if flight is None and behind:
                flight = Flight(behind, states, self._runner.begin(behind))
                for chunk in behind:
                    chunk.sequence.flight = chunk
            if flight is None:
                return [], []
            if not flight.is_intact:
                self._scheduler.ground(flight.chunks)
                return [], []
            work, started = flight.work, time.monotonic()
            total = sum(map(pairs, flight.chunks))
            whole = self._runner.num_layers
            layers = whole if hurry else self._pace.layers(total / whole)
            # The output layer comes after the last one, in a turn of its own where turns are short.
            lands = layers >= whole or not work.num_left
            if work.num_left:
                self._runner.advance(work, layers)
            results = self._runner.finish(work, flight.states) if lands else None
            flight.seconds += time.monotonic() - started
        except Exception:
            chunks = behind if flight is None else flight.chunks
            logger.exception("background work of %d requests has failed", len(chunks))
            return chunks, self._compute(chunks, states if flight is None else flight.states)
        if results is None:
            self._flight = flight
            return [], []
        self._pace.learn(total, flight.seconds)
        return flight.chunks, results

    def _look(self, chunks: list[Chunk], results: list[ChunkResult]) -> None:
        """Let inspections see their rows before the blocks are given back."""
        for chunk, result in zip(chunks, results, strict=True):
            sequence, job = chunk.sequence, self._jobs.get(chunk.sequence)
            if chunk.is_last and result.error is None and isinstance(job, InspectionJob):
                job.look(sequence, self._runner)

    def _begin(self, chunks: list[Chunk], now: float) -> dict[Sequence, SamplerState]:
        """Note which requests begin, and return the sampler states of those that generate."""
        states = {}
        for chunk in chunks:
            job = self._jobs[chunk.sequence]
            job.begin(chunk.sequence, now)
            if isinstance(job, GenerationJob):
                states[chunk.sequence] = job.state
        return states

    def _apply(self, chunks: list[Chunk], results: list[ChunkResult]) -> list[float]:
        """Commit what was computed and let every job take its results; return the times between tokens."""
        self._look(chunks, results)
        now = time.monotonic()
        # Before any client hears of it.
        if any(result.error is None for result in results):
            self._failed_steps = 0
        elif results:
            self._failed_steps += 1
        with self._lock:
            for chunk, result in zip(chunks, results, strict=True):
                if result.error is not None and (job := self._jobs.get(chunk.sequence)) is not None:
                    self._scheduler.discard(chunk.sequence)
                    self._fail([job], result.error)
            self._scheduler.commit(chunks)
            gaps = []
            touched: dict[Job, None] = {}
            for chunk, result in zip(chunks, results, strict=True):
                job = self._jobs.get(chunk.sequence)
                if job is None:
                    continue  # aborted while the model ran
                touched[job] = None
                if result.drawn and (gap := job.token_gap(now)) is not None:
                    gaps.append(gap)
                chunk.sequence.scored += result.scored
                self._scheduler.blocks.keep_scores(chunk.sequence)
                try:
                    done = job.advance(chunk.sequence, result)
                except Exception as error:
                    logger.exception("the result of a request cannot be used")
                    del touched[job]
                    self._fail([job], StepError(f"the result cannot be used: {type(error).__name__}"))
                    continue
                if chunk.proposed:
                    self._scheduler.blocks.settle(chunk)
                if done:
                    self._retire(chunk.sequence, job)
            Mailbox.flush(job.mailbox for job in touched)
            for job in touched:
                if job.finish_reason is not None:
                    self._report(job)
        return gaps

    def _retire(self, sequence: Sequence, job: Job) -> None:
        """Let go of a sequence that is done and add what its job has next; the lock is held."""
        self._scheduler.finish(sequence)
        del self._jobs[sequence]
        job.num_preemptions += sequence.num_preemptions
        for following in job.next_sequences():
            self._scheduler.add(following, accepted=True)
            self._jobs[following] = job


@contextmanager
def _logged() -> Iterator[None]:
    """Keep the faults of an observer from the engine's work."""
    try:
        yield
    except Exception:
        logger.exception("an observer has failed")


def _split(chunks: list[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """Return the chunks that a step computes at once, and background work beside them."""
    parts: tuple[list[Chunk], list[Chunk]] = ([], [])
    for chunk in chunks:
        parts[chunk.sequence.priority > 0 and not chunk.sequence.is_decoding].append(chunk)
    return parts


def _step_stats(
    step: Step,
    chunks: list[Chunk],
    results: list[ChunkResult],
    gaps: list[float],
    seconds: float,
    model_seconds: float,
) -> StepStats:
    return StepStats(
        seconds=seconds,
        num_tokens=sum(chunk.count for chunk in chunks),
        num_prefill_tokens=sum(c.count for c in chunks if c.start < c.sequence.prompt_length),
        num_generated_tokens=sum(len(result.drawn) for result in results),
        num_scored_tokens=sum(len(result.scored) for result in results),
        num_preempted=len(step.preempted) + len(step.yielded),
        prefix_queries=step.prefix_queries,
        prefix_hits=step.prefix_hits,
        inter_token_seconds=tuple(gaps),
        model_seconds=model_seconds,
        drafts=tuple(
            (len(chunk.proposed), max(len(result.drawn) - 1, 0))
            for chunk, result in zip(chunks, results, strict=True)
            if chunk.proposed
        ),
    )
