"""POST /v1/perplexity: what to score with which context, and the statistics that come back.

Natural logarithms throughout. A value that does not exist, such as the log-probability of a token that
was not scored, is null.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from dape_engine.errors import RequestError
from dape_engine.scoring import LadderKind, WindowMode
from dape_server.limits import MAX_LENGTHS, MAX_LOGPROBS
from dape_server.protocol.common import Count, Prompts, RequestBody, Usage


class PerplexityRequest(RequestBody):
    """Inputs to be scored. Windows and ladders are defined in `dape_engine.scoring`."""

    model: str | None = None
    input: Prompts
    window: WindowMode | None = None
    """By default "full". With `lengths`, for an input longer than the model's length, by default only the
    greatest of the lengths."""
    context_length: Count | None = None
    stride: Count | None = None
    score_last: Count | None = None
    """Tokens scored by the window "last" and by each length of the ladder, 256 by default."""
    lengths: Annotated[list[Count], Field(fail_fast=True, min_length=1, max_length=MAX_LENGTHS)] | None = None
    """Context lengths of the ladder."""
    ladder: LadderKind | None = None
    """By default "prefix"."""
    bos: Literal["auto", "always", "never"] = "auto"
    """A first beginning-of-text token: texts by the tokenizer's own rule and ids as given, or always, or
    none added."""
    return_token_logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    """Alternatives beside each log-probability; only with `return_token_logprobs`."""
    stream: bool = False
    """Server-sent events: one after each window, then the answer."""
    user: Annotated[str, Field(max_length=256)] | None = None
    """Accepted for OpenAI's clients and used for nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> PerplexityRequest:
        if self.ladder is not None and self.lengths is None:
            raise RequestError("ladder: only with lengths", param="ladder")
        if self.top_logprobs and not self.return_token_logprobs:
            raise RequestError("top_logprobs: only with return_token_logprobs", param="top_logprobs")
        if self.window == "half" and self.lengths is not None:
            raise RequestError("lengths: cannot be combined with window 'half'", param="lengths")
        return self


class WindowSpan(TypedDict):
    start: int
    end: int
    score_from: int


"""Input tokens start to end - 1 are read, those from score_from on are scored."""

PositionEntry = TypedDict(
    "PositionEntry",
    {"from": int, "to": int, "num_scored": int, "nll_sum": float, "perplexity": float | None},
)
"""Scored tokens with `from` to `to` - 1 tokens of context before them."""


class LadderEntry(TypedDict):
    """The statistics of one context length."""

    length: int
    num_scored: int
    nll_sum: float
    perplexity: float | None


class Totals(TypedDict):
    """Statistics of all scored tokens."""

    num_tokens: int
    num_scored: int
    nll_sum: float
    mean_nll: float | None
    perplexity: float | None
    stderr: float | None
    """Standard error of the perplexity."""
    bits_per_byte: float | None


class InputPerplexity(Totals):
    """The statistics of one input."""

    index: int
    by_position: list[PositionEntry]
    ladder: list[LadderEntry]
    windows: list[WindowSpan]
    token_ids: NotRequired[list[int]]
    token_logprobs: NotRequired[list[float | None]]
    top_logprobs: NotRequired[list[dict[str, float] | None]]


class Corpus(Totals):
    """The statistics of all inputs together."""

    ladder: list[LadderEntry]


class Perplexity(TypedDict):
    """The answer."""

    id: str
    object: Literal["perplexity"]
    created: int
    model: str
    data: list[InputPerplexity]
    corpus: Corpus
    usage: Usage


class Progress(TypedDict):
    """One event of a stream: a window was scored."""

    object: Literal["perplexity.progress"]
    index: int
    """The input's."""
    window: WindowSpan
    num_scored: int
    nll_sum: float
    """Of the window."""
    windows_done: int
    windows_total: int
    """Of the request."""
