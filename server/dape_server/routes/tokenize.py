"""POST /tokenize, POST /detokenize and GET /tokenizer_info."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Response
from starlette.types import Receive, Scope, Send

from dape_server.chat import conversation
from dape_server.context import ServerContext
from dape_server.json_body import JsonRoute
from dape_server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)

router = APIRouter(route_class=JsonRoute)


class PartedResponse(Response):
    """A body of known length that is sent part by part: to join or send tens of megabytes takes too long."""

    def __init__(self, parts: Sequence[bytes], media_type: str):
        self._parts = parts
        length = sum(map(len, parts))
        super().__init__(headers={"Content-Length": str(length)}, media_type=media_type)

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the answer; each part waits until the client has taken those before it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


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
    encoded = await texts.encode_json(
        prompt, field, add_special_tokens=special, with_names=body.return_token_strs
    )
    length = context.engine.max_model_len
    parts = [b'{"count":%d,"max_model_len":%d,"tokens":[' % (encoded.count, length), *encoded.ids, b"]"]
    if body.return_token_strs:
        parts += [b',"token_strs":[', *encoded.names, b"]"]
    return PartedResponse([*parts, b"}"], media_type="application/json")


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
