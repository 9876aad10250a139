"""POST /tokenize, POST /detokenize and GET /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from dape_engine.errors import RequestError
from dape_server.limits import MAX_INPUT_TOKENS
from dape_server.protocol.chat import Messages
from dape_server.protocol.common import RequestBody, TokenId


class TokenizeRequest(RequestBody):
    """A text, or a conversation in the model's chat template, to be turned into token ids."""

    model: str | None = None
    """The served model's name, or none."""
    prompt: str | None = None
    """The text."""
    messages: Messages | None = None
    """Instead of `prompt`."""
    add_generation_prompt: bool = True
    """Of `messages`: whether their text ends with the beginning of an assistant's message."""
    add_special_tokens: bool | None = None
    """By default true for a prompt and, as a template has its own, false for messages."""
    return_token_strs: bool = False
    """Also the text of each token."""

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizeRequest:
        if self.prompt is None and self.messages is None:
            raise RequestError("prompt: this field is required", param="prompt", code="missing_field")
        if self.prompt is not None and self.messages is not None:
            raise RequestError("messages: not with prompt", param="messages")
        return self


class TokenizeResponse(BaseModel):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """Token ids to be turned into a text."""

    model: str | None = None
    """The served model's name, or none."""
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
