"""POST /tokenize, POST /detokenize and GET /tokenizer_info."""

from __future__ import annotations

from fastapi import APIRouter

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


@router.post("/tokenize", response_model_exclude_none=True)
async def tokenize(body: TokenizeRequest, context: ServerContext) -> TokenizeResponse:
    """Turn a text into token ids."""
    context.check_model(body.model)
    texts = context.texts
    (encoded,) = await texts.encode((body.prompt,), "prompt", add_special_tokens=body.add_special_tokens)
    tokens = list(encoded.token_ids)
    names = [texts.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=context.engine.max_model_len,
        tokens=tokens,
        token_strs=names,
    )


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
    )
