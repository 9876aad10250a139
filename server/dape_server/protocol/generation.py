"""What completions and chat completions share: how texts are drawn, stopped, reported and streamed.

OpenAI's names and vLLM's. Every field accepted here works; others are refused by name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from dape_engine.errors import RequestError
from dape_engine.request import SamplingParams
from dape_engine.speculation import SpeculativeConfig
from dape_server.limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_COMPLETIONS,
    MAX_INT,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
)
from dape_server.protocol.common import Count, Positive, Refusal, RequestBody, Shape, TokenId, WorkBody
from dape_server.protocol.structured import GrammarSource, ResponseFormat, StructuredOutputs

SEEDS = 1 << 63
BY_STRUCTURED_OUTPUTS = Refusal("use `structured_outputs`")
NOT_UNDERSTOOD: Mapping[str, Refusal] = {
    "use_beam_search": Refusal("texts are drawn, not searched for", (False,)),
    "length_penalty": Refusal("there is no beam search", (1, 1.0)),
    "early_stopping": Refusal("there is no beam search", (False,)),
    "spaces_between_special_tokens": Refusal("special tokens are written without spaces", (False,)),
    "thinking_token_budget": Refusal("the models do not think apart"),
    "repetition_detection": Refusal("use `repetition_penalty` or `stop`"),
    "logits_processors": Refusal("requests bring no code"),
    "session_id": Refusal("no state is kept between requests but the prefix cache"),
    "kv_transfer_params": Refusal("caches are not moved between servers"),
    "vllm_xargs": Refusal("there are no plugins"),
    "timings_per_token": Refusal("/metrics has the timings", (False,)),
    **dict.fromkeys(
        ("json_schema", "regex", "ebnf", "grammar", "structural_tag", "guided_json", "guided_regex"),
        BY_STRUCTURED_OUTPUTS,
    ),
    **dict.fromkeys(("guided_choice", "guided_grammar", "guided_decoding_backend"), BY_STRUCTURED_OUTPUTS),
}
"""Fields of other servers and clients."""


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
    biases = {int(key): bias for key, bias in value.items()}
    if len(biases) < len(value):
        raise RequestError("logit_bias: two keys are the same token id", param="logit_bias")
    return biases


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(RequestBody):
    """What a stream reports beside the text."""

    place: ClassVar[str] = "stream_options."

    include_usage: bool = False
    """One more chunk before the end, without choices, with the usage of the whole request."""
    continuous_usage_stats: bool = False
    """The usage so far with every chunk."""


class GenerationBody(WorkBody):
    """A request for texts."""

    refused: ClassVar[Mapping[str, Refusal]] = NOT_UNDERSTOOD

    model: str | None = None
    """The served model's name, or none."""
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] = 1
    """Completions of each prompt."""
    stream: bool = False
    """Server-sent events: a chunk for every token, then `[DONE]`."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    stream_interval: Positive = 1
    """Tokens in each chunk of a stream after the first."""
    return_progress: bool = False
    """Chunks with `prompt_progress` while a long prompt is read; only with `stream`."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """0: always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest likeliest tokens that have so much probability together."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] = 0
    """Draw from so many likeliest tokens; 0 or -1: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Draw from tokens that are at least so likely as this times the likeliest one."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken from the logits of tokens that the text has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken from the logit of a token for each time that the text has it."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that prompt or text have."""
    logit_bias: Annotated[
        dict[int, Bias],
        BeforeValidator(_as_token_biases, json_schema_input_type=dict[str, Bias]),
    ] = {}
    """Added to the logits of tokens, by their ids."""
    allowed_token_ids: Annotated[
        list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)
    ] = []
    """Only these tokens are drawn; by default all."""
    bad_words: Annotated[list[BadWord], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] = []
    """Words that are never completed, at the beginning of a text as behind a space."""
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    """The i-th completion of a prompt is drawn with seed + i."""

    stop: Annotated[
        list[StopString],
        Field(fail_fast=True, max_length=MAX_STOP),
        BeforeValidator(_as_list, json_schema_input_type=str | list[StopString]),
    ] = []
    """The text ends before the first of these."""
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] = []
    """The text ends at the first of these tokens."""
    min_tokens: Count = 0
    """The text does not end before, unless a grammar allows nothing but its end."""
    ignore_eos: bool = False
    """Whether the text goes on behind an end-of-text token."""
    include_stop_str_in_output: bool = False
    """Whether the text ends behind the stop string instead of before it."""
    speculative_config: SpeculativeConfig | None = None
    """How tokens are proposed ahead, by default as the server does for all; the text is the same."""
    response_format: ResponseFormat | None = None
    """What the text must be, as OpenAI says it."""
    structured_outputs: StructuredOutputs | None = None
    """What the text must be, as vLLM says it; not with `response_format`."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    """Most tokens of a prompt that are read; -1: as many as fit beside the completion."""
    truncation_side: Literal["left", "right"] = "left"
    """Where a longer prompt loses its tokens; only with `truncate_prompt_tokens`."""

    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    logprob_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_LOGPROB_TOKEN_IDS)] = []
    """Tokens reported beside the likeliest ones at the place of every generated token."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives reported for every token of the prompt; not with `stream`."""
    return_tokens_as_token_ids: bool = False
    """Tokens of log-probabilities are written `token_id:17`."""
    return_token_ids: bool = False
    """Adds `token_ids` and `prompt_token_ids`."""

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives reported per generated token; None: nothing is reported."""

    @property
    @abstractmethod
    def tokens_wanted(self) -> int | None:
        """Most tokens to be generated; None: as many as fit behind the prompt."""

    def grammar_source(self) -> GrammarSource | None:
        """Return what the texts must match, if anything."""
        if self.structured_outputs is not None:
            return self.structured_outputs.source()
        return None if self.response_format is None else self.response_format.grammar()

    @model_validator(mode="after")
    def _consistent_generation(self) -> GenerationBody:
        if self.tokens_wanted is not None and self.min_tokens > self.tokens_wanted:
            raise RequestError(
                f"min_tokens: {self.min_tokens} is above max_tokens {self.tokens_wanted}", param="min_tokens"
            )
        for field, value in (
            ("stream_options", self.stream_options is not None),
            ("stream_interval", self.stream_interval != 1),
            ("return_progress", self.return_progress),
        ):
            if value and not self.stream:
                raise RequestError(f"{field}: only with stream", param=field)
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs: not with stream", param="prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens: must be -1 or at least 1, got 0", param="truncate_prompt_tokens"
            )
        if "truncation_side" in self.model_fields_set and self.truncate_prompt_tokens is None:
            raise RequestError("truncation_side: only with truncate_prompt_tokens", param="truncation_side")
        self._check_grammar()
        return self

    def _check_grammar(self) -> None:
        if self.structured_outputs is not None and self.response_format is not None:
            raise RequestError("structured_outputs: not with response_format", param="structured_outputs")
        if self.allowed_token_ids and self.grammar_source() is not None:
            raise RequestError(
                "allowed_token_ids: cannot be combined with a grammar", param="allowed_token_ids"
            )

    def sampling(self, index: int, max_tokens: int, bad_words: tuple[tuple[int, ...], ...]) -> SamplingParams:
        """Return how the `index`-th completion of a prompt is drawn.

        Args:
            index: below `n`.
            max_tokens: most tokens of this prompt's completions.
            bad_words: the words' token ids.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            allowed_token_ids=tuple(self.allowed_token_ids),
            bad_words=bad_words,
            seed=None if self.seed is None else (self.seed + index) % SEEDS,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.num_logprobs,
            logprob_token_ids=tuple(self.logprob_token_ids),
        )


class PromptLogprob(Shape):
    """vLLM's report of one token at a place of the prompt."""

    logprob: float
    rank: int
    """1 + the number of more likely tokens."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Per token of the prompt by token id; null for the first one."""


class PromptProgressReport(Shape):
    """llama.cpp's report of how much of a prompt has been read."""

    index: int
    """Of the completion."""
    total: int
    cache: int
    processed: int
    time_ms: int
