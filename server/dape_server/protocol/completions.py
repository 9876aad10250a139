"""POST /v1/completions: OpenAI's body with vLLM's extras, and the answer's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NotRequired

from pydantic import Field, model_validator

from dape_engine.errors import RequestError
from dape_server.limits import MAX_COMPLETIONS, MAX_LOGPROBS
from dape_server.protocol.common import Count, Positive, Prompts, Refusal, Shape, Usage
from dape_server.protocol.generation import (
    NOT_UNDERSTOOD,
    GenerationBody,
    PromptLogprobs,
    PromptProgressReport,
)


class CompletionRequest(GenerationBody):
    """A request for completions."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **NOT_UNDERSTOOD,
        "suffix": Refusal("texts are not inserted", ("",)),
    }

    prompt: Prompts
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    max_tokens: Count = 16
    """Most tokens of a completion. 0 only with `echo`: the prompt is scored and nothing is generated."""
    best_of: Positive | None = None
    """Accepted only when equal to `n`."""
    echo: bool = False
    """Puts the prompt before the text."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives reported beside the log-probability of each token; none: nothing is reported."""
    add_special_tokens: bool = True
    """Whether text prompts get the tokenizer's own special tokens, such as a first one."""

    @property
    def num_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and self.logprob_token_ids else self.logprobs

    @property
    def tokens_wanted(self) -> int | None:
        return self.max_tokens

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens: must be at least 1 without echo, got 0", param="max_tokens")
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of: must equal n ({self.n}), got {self.best_of}", param="best_of")
        if (wanted := len(self.prompt) * self.n) > MAX_COMPLETIONS:
            raise RequestError(
                f"n: {len(self.prompt)} prompts x n {self.n} = {wanted} completions are above the limit "
                f"of {MAX_COMPLETIONS}",
                param="n",
            )
        return self


class Logprobs(Shape):
    """OpenAI's four parallel lists, one entry per token; the first token of a prompt has no value."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(Shape):
    """One completion, or what it gained since the last chunk of a stream."""

    index: int
    """Prompts in their order, each with `n` completions."""
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    """ "stop" or "length"; null in a stream before the end."""
    stop_reason: int | str | None
    """The stop string or the id of the stop token that ended the text, or "timeout"; null otherwise."""
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class Completion(Shape):
    """The answer, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: NotRequired[Usage | None]
    prompt_progress: NotRequired[PromptProgressReport]
