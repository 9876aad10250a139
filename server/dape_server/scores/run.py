"""One perplexity request at work: its inputs are scored a few at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import chain

import orjson
from anyio import to_thread

from dape_engine.errors import DeadlineError, QueueFullError
from dape_engine.request import Scheduling, ScoreRequest, WindowScores
from dape_engine.statistics import Statistics, statistics
from dape_server.context import Context
from dape_server.fanout import merge
from dape_server.protocol.perplexity import Perplexity, PerplexityRequest, Progress, RunningTotals
from dape_server.scheduling import engine_id
from dape_server.scores.inputs import Input
from dape_server.scores.plan import Plan
from dape_server.scores.report import Report, corpus, report, span

INPUTS_AT_ONCE = 4
"""Inputs of one request that are in the engine at any time: further ones would only fill its queue."""


class ScoreRun:
    """Scores the windows of all inputs, and keeps what has come so far.

    Args:
        answer_id: of the answer.
        body: what was asked for.
        inputs: in the order of the answer.
        plans: one per input.
        scheduling: of every part of the work.
        context: the server's parts.
    """

    def __init__(
        self,
        answer_id: str,
        body: PerplexityRequest,
        inputs: Sequence[Input],
        plans: Sequence[Plan],
        scheduling: Scheduling,
        context: Context,
    ):
        self._id = answer_id
        self._engine_id = engine_id(answer_id)
        self._body = body
        self._inputs = inputs
        self._plans = plans
        self._scheduling = scheduling
        self._context = context
        self._created = int(time.time())
        self._scores: list[list[WindowScores]] = [[] for _ in inputs]
        self._pieces: list[list[WindowScores]] = [[] for _ in inputs]
        self._sums = [Statistics() for _ in inputs]
        self._sum = Statistics()
        self._windows_done = 0
        self._tokens_done = 0

    async def whole(self) -> Perplexity:
        """Return the finished answer."""
        async with aclosing(self._scored()) as scores:
            async for _ in scores:
                pass
        return await self._answer()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of the stream as JSON: progress after each part of a window, then the answer."""
        windows = sum(len(plan.windows) for plan in self._plans)
        tokens = sum(window.end - window.start for plan in self._plans for window in plan.windows)
        async with aclosing(self._scored()) as scores:
            async for index, scored in scores:
                yield orjson.dumps(self._progress(index, scored, windows, tokens))
        yield orjson.dumps(await self._answer())

    async def _scored(self) -> AsyncGenerator[tuple[int, WindowScores], None]:
        """Score all windows and keep their scores; yield each piece with the index of its input."""
        sources = (self._score(index) for index in range(len(self._plans)))
        async with aclosing(merge(sources, at_once=INPUTS_AT_ONCE)) as scores:
            async for index, scored in scores:
                self._keep(index, scored)
                yield index, scored

    def _keep(self, index: int, piece: WindowScores) -> None:
        """Add a piece to the window that it belongs to, the first one of the input that is not complete."""
        pieces = self._pieces[index]
        number = len(self._scores[index])
        self._tokens_done += piece.window.end - (pieces[-1].window.end if pieces else piece.window.start)
        pieces.append(piece)
        if number < self._plans[index].num_own:
            sums = statistics(piece.logprobs)
            self._sums[index] += sums
            self._sum += sums
        window = self._plans[index].windows[number]
        if piece.window.end == window.end:
            self._scores[index].append(
                WindowScores(
                    window,
                    tuple(chain.from_iterable(part.logprobs for part in pieces)),
                    tuple(chain.from_iterable(part.top for part in pieces)),
                    sum(part.num_cached_tokens for part in pieces),
                )
            )
            self._windows_done += 1
            self._pieces[index] = []

    async def _score(self, index: int) -> AsyncGenerator[WindowScores, None]:
        plan = self._plans[index]
        request = ScoreRequest(
            f"{self._engine_id}-{index}",
            plan.token_ids,
            plan.windows,
            self._body.top_logprobs,
            self._scheduling,
            in_pieces=self._body.stream,
        )
        while True:
            try:
                async with aclosing(self._context.engine.score(request)) as scores:
                    async for scored in scores:
                        yield scored
                return
            except QueueFullError as error:
                # A full queue refuses a request, not the rest of one that is half done.
                if self._windows_done == 0:
                    raise
                await self._wait(error.retry_after)

    async def _wait(self, seconds: float) -> None:
        """Wait, but not beyond the request's time limit.

        Raises:
            DeadlineError: the limit comes first.
        """
        deadline = self._scheduling.deadline
        left = seconds if deadline is None else deadline - time.monotonic()
        await asyncio.sleep(max(0.0, min(seconds, left)))
        if left < seconds:
            raise DeadlineError("the request's time limit has passed while the engine's queue was full")

    def _progress(self, index: int, scored: WindowScores, windows: int, tokens: int) -> Progress:
        sums = statistics(scored.logprobs)
        return {
            "object": "perplexity.progress",
            "id": self._id,
            "index": index,
            "window": span(scored.window),
            "num_scored": sums.num_scored,
            "nll_sum": sums.nll_sum,
            "input": {
                **_running(self._sums[index]),
                "windows_done": len(self._scores[index]),
                "windows_total": len(self._plans[index].windows),
            },
            "corpus": _running(self._sum),
            "windows_done": self._windows_done,
            "windows_total": windows,
            "tokens_done": self._tokens_done,
            "tokens_total": tokens,
        }

    async def _answer(self) -> Perplexity:
        reports = [await to_thread.run_sync(self._report, index) for index in range(len(self._inputs))]
        tokens = sum(len(given.token_ids) for given in self._inputs)
        cached = sum(scored.num_cached_tokens for scores in self._scores for scored in scores)
        return {
            "id": self._id,
            "object": "perplexity",
            "created": self._created,
            "model": self._context.model_name,
            "data": [part.entry for part in reports],
            "corpus": await to_thread.run_sync(corpus, reports),
            "usage": {
                "prompt_tokens": tokens,
                "completion_tokens": 0,
                "total_tokens": tokens,
                "prompt_tokens_details": {"cached_tokens": cached, "read_tokens": self._tokens_done},
            },
        }

    def _report(self, index: int) -> Report:
        return report(
            index,
            self._inputs[index],
            self._plans[index],
            self._scores[index],
            self._body,
            self._context.engine.tokenizer,
        )


def _running(sums: Statistics) -> RunningTotals:
    return {"num_scored": sums.num_scored, "nll_sum": sums.nll_sum, "perplexity": sums.perplexity}
