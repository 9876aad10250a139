"""POST /v1/completions: OpenAI's body with vLLM's sampling extras, and the answer's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import TypedDict

from dape_engine.errors import RequestError
from dape_engine.request import SamplingParams
from dape_server.limits import (
    MAX_COMPLETIONS,
    MAX_INT,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
)
from dape_server.protocol.common import Count, Positive, Prompts, RequestBody, TokenId, Usage

SEEDS = 1 << 63


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_token_biases(value: Any) -> Any:
    """Turn the keys, token ids as JSON text, into numbers."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias: {len(value)} entries are above the limit of {MAX_LOGIT_BIAS}", param="logit_bias"
        )
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError("logit_bias: every key must be a token id", param="logit_bias")
    return {int(key): bias for key, bias in value.items()}


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(RequestBody):
    """What a stream reports beside the text."""

    include_usage: bool = False
    """One more chunk before the end, without choices, with the usage of the whole request."""
    continuous_usage_stats: bool = False
    """The usage so far with every chunk."""


class CompletionRequest(RequestBody):
    """A request for completions. Every field accepted here works; others are refused by name."""

    model: str | None = None
    prompt: Prompts
    max_tokens: Count = 16
    """0 only with `echo`: the prompt is scored and nothing is generated."""
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] = 1
    best_of: Positive | None = None
    """Accepted only when equal to `n`."""
    suffix: Literal[""] | None = None
    """Insertion is not supported."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    """Accepted for OpenAI's clients and used for nothing."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] = 0
    """0 or -1: off."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[
        dict[int, Bias],
        BeforeValidator(_as_token_biases, json_schema_input_type=dict[str, Bias]),
    ] = {}
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    """The i-th completion of a prompt is drawn with seed + i."""

    stop: Annotated[
        list[StopString],
        Field(fail_fast=True, max_length=MAX_STOP),
        BeforeValidator(_as_list, json_schema_input_type=str | list[StopString]),
    ] = []
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] = []
    min_tokens: Count = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    """Whether text prompts get the tokenizer's own special tokens, such as a first one."""
    return_tokens_as_token_ids: bool = False
    """Tokens of `logprobs` are written `token_id:17`."""
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens: must be at least 1 without echo, got 0", param="max_tokens")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens: {self.min_tokens} is above max_tokens {self.max_tokens}", param="min_tokens"
            )
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of: must equal n ({self.n}), got {self.best_of}", param="best_of")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: only with stream", param="stream_options")
        if (wanted := len(self.prompt) * self.n) > MAX_COMPLETIONS:
            raise RequestError(
                f"n: {len(self.prompt)} prompts x n {self.n} = {wanted} completions are above the limit "
                f"of {MAX_COMPLETIONS}",
                param="n",
            )
        return self

    def sampling(self, index: int) -> SamplingParams:
        """Return how the `index`-th completion of a prompt is drawn."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            seed=None if self.seed is None else (self.seed + index) % SEEDS,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.logprobs,
        )


class Logprobs(TypedDict):
    """OpenAI's four parallel lists, one entry per token; the first token of a prompt has no value."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(TypedDict):
    """One completion, or what it gained since the last chunk of a stream."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    """The answer, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: NotRequired[Usage | None]
