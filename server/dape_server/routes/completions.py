"""POST /v1/completions, as one answer or as a stream."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from dape_server.answers import Answer, Plan, make_plan
from dape_server.choices import CompletionWriter, Echo
from dape_server.context import Context, ServerContext
from dape_server.json_body import JsonRoute
from dape_server.protocol.completions import Completion, CompletionRequest
from dape_server.scheduling import scheduling

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", response_model=None, responses={200: {"model": Completion}})
async def create_completion(body: CompletionRequest, request: Request, context: ServerContext) -> Response:
    """Complete one prompt or many."""
    context.check_model(body.model)
    place = scheduling(body, request, context.settings)
    prompts = await context.texts.encode(
        body.prompt,
        "prompt",
        add_special_tokens=body.add_special_tokens,
        max_tokens=context.engine.max_model_len if body.truncate_prompt_tokens is None else None,
    )
    echoed = body.logprobs if body.echo else None
    plan = await make_plan("cmpl", body, prompts, echoed, place, request, context)
    return await CompletionAnswer(body, plan, context).respond()


class CompletionAnswer(Answer):
    """The completions of one request."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest, plan: Plan, context: Context):
        super().__init__(body, plan, context)
        self._request = body

    async def writers(self) -> Sequence[CompletionWriter]:
        body, texts, tokenizer = self._request, self._context.texts, self._context.engine.tokenizer
        prompts = self._plan.prompts
        echoes = [await Echo.of(prompt, body, texts) for prompt in prompts]
        return [
            CompletionWriter(place * body.n + i, prompts[place], echoes[place], body, tokenizer)
            for place in range(len(prompts))
            for i in range(body.n)
        ]
