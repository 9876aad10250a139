"""POST /tokenize, POST /detokenize and GET /tokenizer_info."""

from __future__ import annotations

from functools import partial

import orjson
from anyio import to_thread
from fastapi import APIRouter, Response

from dape_server.chat import conversation
from dape_server.context import Context, ServerContext
from dape_server.json_body import JsonRoute
from dape_server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", response_model=None, responses={200: {"model": TokenizeResponse}})
async def tokenize(body: TokenizeRequest, context: ServerContext) -> Response:
    """Turn a text or a conversation into token ids."""
    context.check_model(body.model)
    texts = context.texts
    prompt, field, special = body.prompt, "prompt", body.add_special_tokens is not False
    if prompt is None:
        prompt = await conversation(
            context.chat, body.messages or [], add_generation_prompt=body.add_generation_prompt
        )
        field, special = "messages", body.add_special_tokens is True
    (encoded,) = await texts.encode((prompt,), field, add_special_tokens=special)
    answer = partial(_answer, encoded.token_ids, body.return_token_strs, context)
    return Response(await to_thread.run_sync(answer), media_type="application/json")


def _answer(token_ids: tuple[int, ...], with_names: bool, context: Context) -> bytes:
    """Write the answer to /tokenize; a million tokens take too long for the event loop."""
    answer: dict[str, object] = {
        "count": len(token_ids),
        "max_model_len": context.engine.max_model_len,
        "tokens": token_ids,
    }
    if with_names:
        answer["token_strs"] = [context.texts.tokenizer.token_text(token) for token in token_ids]
    return orjson.dumps(answer)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: ServerContext) -> DetokenizeResponse:
    """Turn token ids into a text."""
    context.check_model(body.model)
    context.texts.check_ids(body.tokens, "tokens")
    return DetokenizeResponse(prompt=await context.texts.decode(body.tokens))


@router.get("/tokenizer_info")
async def tokenizer_info(context: ServerContext) -> TokenizerInfo:
    """Return the tokenizer's special tokens."""
    tokenizer = context.engine.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return TokenizerInfo(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=None if bos is None else tokenizer.token_text(bos),
        eos_token=None if eos is None else tokenizer.token_text(eos),
        chat_template=tokenizer.chat_template,
    )
