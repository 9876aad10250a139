"""POST /tokenize, POST /detokenize and GET /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from dape_server.limits import MAX_INPUT_TOKENS
from dape_server.protocol.common import RequestBody, TokenId


class TokenizeRequest(RequestBody):
    """A text to be turned into token ids."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeResponse(BaseModel):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """Token ids to be turned into a text."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_INPUT_TOKENS)]


class DetokenizeResponse(BaseModel):
    """The text of token ids, special tokens included."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Special tokens, as evaluation harnesses ask for them."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None = None
    chat_template: str | None = None
