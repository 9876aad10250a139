"""POST /v1/perplexity, as one answer or with an event after each window."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import orjson
from anyio import to_thread
from fastapi import APIRouter, Response

from dape_engine.errors import QueueFullError, RequestError
from dape_engine.request import ScoreRequest, WindowScores
from dape_engine.scoring import statistics
from dape_server.context import Context, ServerContext
from dape_server.fanout import merge
from dape_server.json_body import JsonRoute
from dape_server.limits import MAX_INPUT_TOKENS, MAX_LOGPROB_ENTRIES, MAX_READ_TOKENS, MAX_WINDOWS
from dape_server.protocol.perplexity import Perplexity, PerplexityRequest, Progress
from dape_server.scores import Plan, Report, corpus, make_plan, report, span
from dape_server.sse import EventStream

router = APIRouter(route_class=JsonRoute)
INPUTS_AT_ONCE = 4
"""Inputs of one request that are in the engine at any time: further ones would only fill its queue."""


@router.post("/v1/perplexity", response_model=None, responses={200: {"model": Perplexity}})
async def create_perplexity(body: PerplexityRequest, context: ServerContext) -> Response:
    """Score one input or many."""
    context.check_model(body.model)
    inputs = await _token_ids(body, context)
    tokens = sum(map(len, inputs))
    _check_size("input", "tokens", tokens, MAX_INPUT_TOKENS)
    for field, advance in (("stride", body.stride), ("context_length", body.context_length)):
        if advance:
            # Windows are counted before they are made, as far as that can be told.
            _check_size(field, "windows or more", tokens // advance, MAX_WINDOWS)
            break
    engine = context.engine
    plans = [make_plan(body, ids, engine.config.bos_token_id, engine.max_model_len) for ids in inputs]
    _check_size("input", "windows", sum(len(plan.windows) for plan in plans), MAX_WINDOWS)
    read = sum(window.end - window.start for plan in plans for window in plan.windows)
    _check_size("input", "tokens read by all windows", read, MAX_READ_TOKENS)
    if body.return_token_logprobs:
        values = tokens * (1 + body.top_logprobs)
        _check_size("top_logprobs", "values in the answer", values, MAX_LOGPROB_ENTRIES)
    answer = PerplexityAnswer(body, inputs, plans, context)
    if body.stream:
        return await EventStream.open(answer.events())
    return Response(orjson.dumps(await answer.whole()), media_type="application/json")


class PerplexityAnswer:
    """One request at work: its inputs are scored a few at a time."""

    def __init__(
        self,
        body: PerplexityRequest,
        inputs: Sequence[tuple[int, ...]],
        plans: Sequence[Plan],
        context: Context,
    ):
        self._body = body
        self._inputs = inputs
        self._plans = plans
        self._context = context
        self._id = f"ppl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._scores: list[list[WindowScores]] = [[] for _ in inputs]
        self._windows_done = 0

    async def whole(self) -> Perplexity:
        """Return the finished answer."""
        async with aclosing(self._progress()) as events:
            async for _ in events:
                pass
        return await self._answer()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of the stream as JSON."""
        async with aclosing(self._progress()) as events:
            async for event in events:
                yield orjson.dumps(event)
        yield orjson.dumps(await self._answer())

    async def _progress(self) -> AsyncGenerator[Progress, None]:
        """Score all windows and keep their scores; yield an event for each."""
        total = sum(len(plan.windows) for plan in self._plans)
        sources = (self._score(index) for index in range(len(self._plans)))
        async with aclosing(merge(sources, at_once=INPUTS_AT_ONCE)) as scores:
            async for index, scored in scores:
                self._scores[index].append(scored)
                self._windows_done += 1
                sums = statistics(scored.logprobs)
                yield {
                    "object": "perplexity.progress",
                    "index": index,
                    "window": span(scored.window),
                    "num_scored": sums.num_scored,
                    "nll_sum": sums.nll_sum,
                    "windows_done": self._windows_done,
                    "windows_total": total,
                }

    async def _score(self, index: int) -> AsyncGenerator[WindowScores, None]:
        plan = self._plans[index]
        request = ScoreRequest(f"{self._id}-{index}", plan.token_ids, plan.windows, self._body.top_logprobs)
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
                await asyncio.sleep(error.retry_after)

    async def _answer(self) -> Perplexity:
        reports = [await to_thread.run_sync(self._report, index) for index in range(len(self._inputs))]
        tokens = sum(map(len, self._inputs))
        return {
            "id": self._id,
            "object": "perplexity",
            "created": self._created,
            "model": self._context.model_name,
            "data": [part.entry for part in reports],
            "corpus": corpus(reports),
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
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


async def _token_ids(body: PerplexityRequest, context: Context) -> list[tuple[int, ...]]:
    """Return the inputs as token ids, with a first BOS token as asked."""
    bos = context.engine.config.bos_token_id
    if body.bos == "always" and bos is None:
        raise RequestError("bos: this model has no beginning-of-text token", param="bos")
    whole = body.window in (None, "full") and body.lengths is None
    prompts = await context.texts.encode(
        body.input,
        "input",
        add_special_tokens=body.bos != "never",
        max_tokens=context.engine.max_model_len if whole else None,
    )
    inputs = [prompt.token_ids for prompt in prompts]
    if body.bos == "always" and bos is not None:
        inputs = [ids if ids[:1] == (bos,) else (bos, *ids) for ids in inputs]
    return inputs


def _check_size(field: str, what: str, value: int, limit: int) -> None:
    if value > limit:
        raise RequestError(f"{field}: {value} {what} are above the limit of {limit}", param=field)
