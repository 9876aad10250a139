"""POST /v1/chat/completions, as one answer or as a stream, where the model has a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from dape_server.answers import Answer, Plan, make_plan
from dape_server.chat import conversation
from dape_server.chat_choices import ChatWriter
from dape_server.context import Context, ServerContext
from dape_server.json_body import JsonRoute
from dape_server.protocol.chat import ChatCompletion, ChatRequest
from dape_server.scheduling import scheduling

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletion}})
async def create_chat_completion(body: ChatRequest, request: Request, context: ServerContext) -> Response:
    """Write the assistant's next message."""
    context.check_model(body.model)
    place = scheduling(body, request, context.settings)
    text = await conversation(context.chat, body.messages, add_generation_prompt=body.add_generation_prompt)
    prompts = await context.texts.encode(
        (text,),
        "messages",
        add_special_tokens=body.add_special_tokens,
        max_tokens=context.engine.max_model_len if body.truncate_prompt_tokens is None else None,
    )
    plan = await make_plan("chatcmpl", body, prompts, None, place, request, context)
    return await ChatAnswer(body, plan, context).respond()


class ChatAnswer(Answer):
    """The messages of one request."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, plan: Plan, context: Context):
        super().__init__(body, plan, context)
        self._request = body

    async def writers(self) -> Sequence[ChatWriter]:
        tokenizer = self._context.engine.tokenizer
        (prompt,) = self._plan.prompts
        return [ChatWriter(index, prompt, self._request, tokenizer) for index in range(self._request.n)]
