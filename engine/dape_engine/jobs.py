"""Requests at work: what each one does with the results of its rows, and what it sends back.

A job lives in the engine's thread; only its mailbox reaches into the client's event loop.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from typing import Literal

from dape_engine.detokenizer import OutputText
from dape_engine.errors import DeadlineError
from dape_engine.request import (
    TIMED_OUT,
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    PromptProgress,
    RequestStats,
    RequestTimes,
    Scheduling,
    ScoreRequest,
    TokenLogprob,
    Window,
    WindowScores,
)
from dape_engine.sampling import SamplerState
from dape_engine.sequence import Sequence
from dape_engine.speculation import PromptLookup, SpeculativeConfig
from dape_engine.step import ChunkResult
from dape_engine.tokenizer import TextTokenizer

# Windows of one scoring request that run side by side: enough to fill a batch with short ones, few
# enough not to push other requests out of it.
WINDOWS_IN_FLIGHT = 4


class Mailbox:
    """Items on their way from the engine's thread to one client's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Not a queue of asyncio's, which does more for each item than one reader needs.
        self._items = deque[object]()
        self._reader: asyncio.Future[None] | None = None
        self._pending: list[object] = []

    def put(self, item: object) -> None:
        """Keep an item for the next flush."""
        self._pending.append(item)

    def close(self, error: Exception | None = None) -> None:
        """Say that nothing more comes, after an error where there was one."""
        self._pending += [None] if error is None else [error, None]

    async def get(self) -> object | None:
        """Return the next item, or None at the end; for one reader at a time."""
        if not self._items:
            self._reader = self._loop.create_future()
            await self._reader
        return self._items.popleft()

    @staticmethod
    def flush(mailboxes: Iterable[Mailbox]) -> None:
        """Hand over what was kept; each event loop wakes once for all of its clients."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, list[object]]]] = {}
        for mailbox in mailboxes:
            if mailbox._pending:
                by_loop.setdefault(mailbox._loop, []).append((mailbox, mailbox._pending))
                mailbox._pending = []
        for loop, deliveries in by_loop.items():
            # A loop that is closed has no clients any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(Mailbox._deliver, deliveries)

    @staticmethod
    def _deliver(deliveries: list[tuple[Mailbox, list[object]]]) -> None:
        for mailbox, items in deliveries:
            mailbox._items += items
            if mailbox._reader is not None and not mailbox._reader.done():
                mailbox._reader.set_result(None)


class Job(ABC):
    """One request in the engine."""

    kind: Literal["generate", "score", "inspect"]

    def __init__(self, request_id: str, scheduling: Scheduling) -> None:
        self.request_id = request_id
        self.context = copy_context()
        self.scheduling = scheduling
        self.mailbox = Mailbox()
        self.sequences: list[Sequence] = []
        self.times = RequestTimes(queued=time.monotonic())
        self.finish_reason: FinishReason | None = None
        self.num_scored = 0
        self.num_cached = 0
        self.num_preemptions = 0
        self._last_token: float | None = None

    @abstractmethod
    def next_sequences(self) -> list[Sequence]:
        """Return the sequences to be added to the scheduler now."""

    @abstractmethod
    def advance(self, sequence: Sequence, result: ChunkResult) -> bool:
        """Take the result of one chunk and return whether its sequence is done."""

    @abstractmethod
    def expire(self) -> None:
        """End the request at its deadline."""

    @abstractmethod
    def stats(self) -> RequestStats:
        """Return the facts for metrics, once finished."""

    def begin(self, sequence: Sequence, now: float) -> None:
        """Note the first step of the request, at `now` seconds of the monotonic clock."""
        if self.times.scheduled is None:
            self.mark(scheduled=now)
            self.num_cached = sequence.num_cached

    def token_gap(self, now: float) -> float | None:
        """Note a token at `now` seconds of the monotonic clock; return the time since the last one."""
        gap = None if self._last_token is None else now - self._last_token
        if gap is None:
            self.mark(first_token=now)
        self._last_token = now
        return gap

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End the request."""
        self.finish_reason = reason
        self.mailbox.close(error)

    def mark(self, **times: float) -> None:
        """Record clock readings."""
        self.times = replace(self.times, **times)

    def _request_stats(self, prompt_tokens: int, generated: int, max_tokens: int) -> RequestStats:
        return RequestStats(
            kind=self.kind,
            finish_reason=self.finish_reason or "abort",
            num_prompt_tokens=prompt_tokens,
            num_generated_tokens=generated,
            num_scored_tokens=self.num_scored,
            num_cached_tokens=self.num_cached,
            num_preemptions=self.num_preemptions,
            max_tokens=max_tokens,
            times=self.times,
        )


class GenerationJob(Job):
    """One prompt and one completion."""

    kind = "generate"

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: TextTokenizer,
        vocab_size: int,
        speculation: SpeculativeConfig | None = None,
    ) -> None:
        super().__init__(request.request_id, request.scheduling)
        self.request = request
        sampling = request.sampling
        lookup = None
        # A grammar knows what may come next, not what may come after that.
        if speculation is not None and speculation.num_speculative_tokens and request.constraint is None:
            lookup = PromptLookup(speculation)
        self.sequence = Sequence(
            request.request_id,
            list(request.prompt),
            # Without tokens to generate the prompt is only scored, as `echo` with `max_tokens` 0 asks.
            sampling=sampling if sampling.max_tokens > 0 else None,
            score_from=None if request.prompt_logprobs is None else 1,
            top_logprobs=request.prompt_logprobs or 0,
            priority=request.scheduling.priority,
            tenant=request.scheduling.tenant,
            cache_salt=request.scheduling.cache_salt,
            lookup=lookup,
        )
        self.state = SamplerState(
            sampling, request.prompt, tokenizer.eos_token_id, vocab_size, request.constraint
        )
        self.text = OutputText(tokenizer, sampling)
        self._begun = False

    def next_sequences(self) -> list[Sequence]:
        if self.sequences:
            return []
        self.sequences = [self.sequence]
        return [self.sequence]

    def advance(self, sequence: Sequence, result: ChunkResult) -> bool:
        self.num_scored = sequence.num_scored
        if self.request.report_progress and sequence.num_generated == 0:
            self.mailbox.put(GenerationOutput("", (), progress=self._progress()))
        if sequence.sampling is None and sequence.num_remaining == 0:
            self._emit(GenerationOutput("", (), finish_reason="length"))
            self.finish("length")
        for count, token in enumerate(result.drawn, 1):
            self._grow(token)
            if self.finish_reason is not None:
                # What was drawn behind the end is no part of the text.
                del result.drawn[count:]
        return self.finish_reason is not None

    def _grow(self, sampled: TokenLogprob) -> None:
        """Append a token, send its text and end the request where it must end."""
        sampling = self.request.sampling
        self.sequence.tokens.append(sampled.token_id)
        self.state.append(sampled.token_id)
        constraint = self.request.constraint
        if constraint is not None and constraint.error is not None:
            self.finish("abort", constraint.error)
            return
        piece = self.text.push(sampled.token_id)
        reason: FinishReason | None = piece.finish_reason
        text = piece.text
        if reason is None and constraint is not None and constraint.is_complete:
            reason = "stop"
            text += self.text.flush()
        if reason is None and self.sequence.num_generated >= sampling.max_tokens:
            reason = "length"
            text += self.text.flush()
        self._emit(
            GenerationOutput(
                text=text,
                token_ids=(sampled.token_id,),
                logprobs=() if sampling.logprobs is None else (sampled,),
                text_offsets=(piece.offset,),
                finish_reason=reason,
                stop_reason=piece.stop_reason,
            )
        )
        if reason is not None:
            self.finish(reason)

    def expire(self) -> None:
        if self.request.prompt_logprobs is not None and not self._begun:
            # There is no half an echo.
            self.finish("abort", deadline_error())
            return
        self._emit(GenerationOutput(self.text.flush(), (), finish_reason="length", stop_reason=TIMED_OUT))
        self.finish("length")

    def _progress(self) -> PromptProgress:
        return PromptProgress(
            total=self.sequence.prompt_length,
            cached=self.num_cached,
            processed=min(self.sequence.num_computed, self.sequence.prompt_length),
            seconds=time.monotonic() - self.times.queued,
        )

    def _emit(self, output: GenerationOutput) -> None:
        if not self._begun:
            wanted = self.request.prompt_logprobs is not None
            output = replace(
                output,
                prompt_logprobs=(None, *self.sequence.scored) if wanted else None,
                num_cached_tokens=self.num_cached,
            )
            self._begun = True
        self.mailbox.put(output)

    def stats(self) -> RequestStats:
        return self._request_stats(
            len(self.request.prompt), self.sequence.num_generated, self.request.sampling.max_tokens
        )


class ScoreJob(Job):
    """The log-probabilities of one input, window by window, sent in the order of the windows."""

    kind = "score"

    def __init__(self, request: ScoreRequest) -> None:
        super().__init__(request.request_id, request.scheduling)
        self.request = request
        self._waiting = deque(enumerate(request.windows))
        self._running: dict[Sequence, tuple[int, Window]] = {}
        self._ends: dict[Sequence, int] = {}
        self._unsent: dict[int, list[WindowScores]] = {}
        self._next = 0

    def next_sequences(self) -> list[Sequence]:
        added = []
        while self._waiting and len(self._running) < WINDOWS_IN_FLIGHT:
            index, window = self._waiting.popleft()
            sequence = Sequence(
                f"{self.request_id}-{index}",
                list(self.request.token_ids[window.start : window.end]),
                score_from=window.score_from - window.start,
                top_logprobs=self.request.top_logprobs,
                priority=self.scheduling.priority,
                tenant=self.scheduling.tenant,
                cache_salt=self.scheduling.cache_salt,
            )
            self._running[sequence] = (index, window)
            added.append(sequence)
        self.sequences = list(self._running)
        return added

    def advance(self, sequence: Sequence, result: ChunkResult) -> bool:  # noqa: ARG002 (see `scored`)
        index, window = self._running[sequence]
        ends = sequence.num_remaining == 0
        last_end = self._ends.get(sequence, 0)
        end = window.end if ends else min(window.start + sequence.num_computed + 1, window.end - 1)
        # After a preemption it takes a while until there is more to tell.
        if ends or (self.request.in_pieces and end > last_end):
            self._ends[sequence] = end
            self._unsent.setdefault(index, []).append(self._piece(sequence, window, last_end, end))
        if ends:
            del self._running[sequence], self._ends[sequence]
            self.num_scored += sequence.num_scored
        self._send()
        return ends

    def _piece(self, sequence: Sequence, window: Window, last_end: int, end: int) -> WindowScores:
        """Return the scores of a window's tokens from the end of its last piece to `end`."""
        first = min(max(window.score_from, last_end), end)
        scored = sequence.scored[max(0, first - window.score_from) : max(0, end - window.score_from)]
        ends = end == window.end
        return WindowScores(
            Window(window.start, end, first),
            tuple(token.logprob for token in scored),
            tuple(token.top for token in scored) if self.request.top_logprobs else (),
            # What it finds again after a preemption may be its own work.
            num_cached_tokens=sequence.num_cached if ends and not sequence.num_preemptions else 0,
        )

    def _send(self) -> None:
        """Send what comes next in the order of the windows."""
        windows = self.request.windows
        while (pieces := self._unsent.pop(self._next, None)) is not None:
            for piece in pieces:
                self.mailbox.put(piece)
            if pieces[-1].window.end < windows[self._next].end:
                return
            self._next += 1
        if self._next == len(windows):
            self.finish("stop")

    def expire(self) -> None:
        self.finish("abort", deadline_error())

    def stats(self) -> RequestStats:
        return self._request_stats(len(self.request.token_ids), 0, 0)


def deadline_error() -> DeadlineError:
    """Return the error of a request that has nothing to show at its deadline."""
    return DeadlineError("timeout: the request's time limit has passed before its answer was complete")
