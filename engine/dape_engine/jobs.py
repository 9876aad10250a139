"""Requests at work: what each one does with the results of its rows, and what it sends back.

A job lives in the engine's thread; only its mailbox reaches into the client's event loop.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import replace
from typing import Literal

from dape_engine.detokenizer import OutputText
from dape_engine.request import (
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    RequestStats,
    RequestTimes,
    ScoreRequest,
    TokenLogprob,
    Window,
    WindowScores,
)
from dape_engine.runner import ChunkResult
from dape_engine.sampling import SamplerState
from dape_engine.sequence import Sequence
from dape_engine.tokenizer import TextTokenizer

# Windows of one scoring request that run side by side: enough to fill a batch with short ones, few
# enough not to push other requests out of it.
WINDOWS_IN_FLIGHT = 4
GENERATION_PRIORITY = 0
SCORING_PRIORITY = 1


class Mailbox:
    """Items on their way from the engine's thread to one client's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[object] = asyncio.Queue()
        self._pending: list[object] = []

    def put(self, item: object) -> None:
        """Keep an item for the next flush."""
        self._pending.append(item)

    def close(self, error: Exception | None = None) -> None:
        """Say that nothing more comes, after an error where there was one."""
        self._pending += [None] if error is None else [error, None]

    def flush(self) -> None:
        """Hand over what was kept; the client's loop wakes once for all of it."""
        pending, self._pending = self._pending, []
        if pending and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, pending)

    async def get(self) -> object | None:
        """Return the next item, or None at the end."""
        return await self._items.get()

    def _deliver(self, pending: list[object]) -> None:
        for item in pending:
            self._items.put_nowait(item)


class Job(ABC):
    """One request in the engine."""

    kind: Literal["generate", "score"]

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
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

    def _count(self, sequence: Sequence, result: ChunkResult) -> None:
        sequence.num_scored += len(result.scored)
        self.num_scored += len(result.scored)

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

    def __init__(self, request: GenerationRequest, tokenizer: TextTokenizer, vocab_size: int) -> None:
        super().__init__(request.request_id)
        self.request = request
        sampling = request.sampling
        self.sequence = Sequence(
            request.request_id,
            list(request.prompt),
            # Without tokens to generate the prompt is only scored, as `echo` with `max_tokens` 0 asks.
            sampling=sampling if sampling.max_tokens > 0 else None,
            score_from=None if request.prompt_logprobs is None else 1,
            top_logprobs=request.prompt_logprobs or 0,
            priority=GENERATION_PRIORITY,
        )
        self.state = SamplerState(sampling, request.prompt, tokenizer.eos_token_id, vocab_size)
        self.text = OutputText(tokenizer, sampling)
        self.prompt_logprobs: list[TokenLogprob | None] = [None]

    def next_sequences(self) -> list[Sequence]:
        if self.sequences:
            return []
        self.sequences = [self.sequence]
        return [self.sequence]

    def advance(self, sequence: Sequence, result: ChunkResult) -> bool:
        self.prompt_logprobs += result.scored
        self._count(sequence, result)
        if sequence.sampling is None and sequence.num_remaining == 0:
            self._emit(GenerationOutput("", (), finish_reason="length"))
            self.finish("length")
        if result.sampled is not None:
            self._grow(result.sampled)
        return self.finish_reason is not None

    def _grow(self, sampled: TokenLogprob) -> None:
        """Append a token, send its text and end the request where it must end."""
        sampling = self.request.sampling
        self.sequence.tokens.append(sampled.token_id)
        self.state.append(sampled.token_id)
        piece = self.text.push(sampled.token_id)
        reason: FinishReason | None = piece.finish_reason
        text = piece.text
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

    def _emit(self, output: GenerationOutput) -> None:
        if self.sequence.num_generated <= 1:
            wanted = self.request.prompt_logprobs is not None
            output = replace(
                output,
                prompt_logprobs=tuple(self.prompt_logprobs) if wanted else None,
                num_cached_tokens=self.num_cached,
            )
        self.mailbox.put(output)

    def stats(self) -> RequestStats:
        return self._request_stats(
            len(self.request.prompt), self.sequence.num_generated, self.request.sampling.max_tokens
        )


class ScoreJob(Job):
    """The log-probabilities of one input, window by window, sent in the order of the windows."""

    kind = "score"

    def __init__(self, request: ScoreRequest) -> None:
        super().__init__(request.request_id)
        self.request = request
        self._waiting = deque(enumerate(request.windows))
        self._running: dict[Sequence, tuple[int, Window, list[TokenLogprob]]] = {}
        self._done: dict[int, WindowScores] = {}
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
                priority=SCORING_PRIORITY,
            )
            self._running[sequence] = (index, window, [])
            added.append(sequence)
        self.sequences = list(self._running)
        return added

    def advance(self, sequence: Sequence, result: ChunkResult) -> bool:
        index, window, scored = self._running[sequence]
        scored += result.scored
        self._count(sequence, result)
        if sequence.num_remaining > 0:
            return False
        del self._running[sequence]
        self._done[index] = WindowScores(
            window,
            tuple(token.logprob for token in scored),
            tuple(token.top for token in scored) if self.request.top_logprobs else (),
        )
        while self._next in self._done:
            self.mailbox.put(self._done.pop(self._next))
            self._next += 1
        if self._next == len(self.request.windows):
            self.finish("stop")
        return True

    def stats(self) -> RequestStats:
        return self._request_stats(len(self.request.token_ids), 0, 0)
