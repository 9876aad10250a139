"""POST /v1/perplexity, as one answer or with an event after each window."""

from __future__ import annotations

import orjson
from anyio import to_thread
from fastapi import APIRouter, Request, Response

from dape_engine.request import BACKGROUND
from dape_server.context import ServerContext
from dape_server.json_body import JsonRoute
from dape_server.protocol.perplexity import Perplexity, PerplexityRequest
from dape_server.scheduling import answer_id, scheduling
from dape_server.scores.inputs import read_inputs
from dape_server.scores.plan import make_plans
from dape_server.scores.run import ScoreRun
from dape_server.sse import EventStream

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/perplexity", response_model=None, responses={200: {"model": Perplexity}})
async def create_perplexity(body: PerplexityRequest, request: Request, context: ServerContext) -> Response:
    """Score one input or many."""
    context.check_model(body.model)
    place = scheduling(body, request, context.settings, BACKGROUND.priority)
    inputs = await read_inputs(body, context)
    plans = await to_thread.run_sync(make_plans, body, inputs, context.engine.max_model_len)
    run = ScoreRun(answer_id("ppl", body, request), body, inputs, plans, place, context)
    if body.stream:
        return await EventStream.open(run.events(), context.settings.sse_ping_interval)
    return Response(orjson.dumps(await run.whole()), media_type="application/json")
