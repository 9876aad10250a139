"""POST /v1/perplexity: what to score with which context, and the statistics that come back.

Natural logarithms throughout. A value that does not exist, such as the log-probability of a token that
was not scored, is null; in base64 arrays it is NaN.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypeAlias

from pydantic import Field, PlainValidator, model_validator
from typing_extensions import TypedDict

from dape_engine.errors import RequestError
from dape_engine.scoring import LadderKind, WindowMode
from dape_server.limits import MAX_LENGTHS, MAX_LOGPROBS
from dape_server.protocol.common import Count, Prompts, Shape, Usage, WorkBody
from dape_server.protocol.reference import Reference

BosRule: TypeAlias = Literal["auto", "always", "never"] | int
EncodingFormat: TypeAlias = Literal["float", "base64"]


def _as_bos_rule(value: object) -> BosRule:
    if value in ("auto", "always", "never") or type(value) is int:
        return value
    raise RequestError("bos: must be 'auto', 'always', 'never' or a token id", param="bos")


class PerplexityRequest(WorkBody):
    """Inputs to be scored. Windows and ladders are defined in `dape_engine.scoring`."""

    model: str | None = None
    """The served model's name, or none."""
    input: Prompts
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    window: WindowMode | None = None
    """By default "full". With `lengths`, for an input longer than the model's length, by default only the
    greatest of the lengths."""
    context_length: Count | None = None
    """Tokens of a window, scored ones included; by default all of the input, as far as the model reads."""
    stride: Count | None = None
    """Of the window "sliding": tokens from one window to the next, half of `context_length` by default."""
    score_last: Count | None = None
    """Tokens scored by the window "last" and by each length of the ladder, 256 by default."""
    lengths: Annotated[list[Count], Field(fail_fast=True, min_length=1, max_length=MAX_LENGTHS)] | None = None
    """Context lengths of the ladder."""
    ladder: LadderKind | None = None
    """By default "prefix"."""
    bos: Annotated[BosRule, PlainValidator(_as_bos_rule, json_schema_input_type=BosRule)] = "auto"
    """A first beginning-of-text token: texts by the tokenizer's own rule and ids as given, or always, or
    none added, or always the token of this id in place of the tokenizer's own."""
    reference: Reference | None = None
    """Per input the NLLs of its tokens by another model, or null: a list with null, or base64 of float32
    with NaN, for tokens without one. Adds `paired_difference`."""
    return_token_logprobs: bool = False
    """Adds `token_ids` and `token_logprobs`."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    """Alternatives beside each log-probability; only with `return_token_logprobs`."""
    encoding_format: EncodingFormat = "float"
    """Of `token_ids` and `token_logprobs`: JSON lists, or base64 of int32 and float32, little-endian."""
    stream: bool = False
    """Server-sent events: one after each window, then the answer."""

    @model_validator(mode="after")
    def _consistent(self) -> PerplexityRequest:
        if self.ladder is not None and self.lengths is None:
            raise RequestError("ladder: only with lengths", param="ladder")
        for field in ("top_logprobs", "encoding_format"):
            if getattr(self, field) not in (0, "float") and not self.return_token_logprobs:
                raise RequestError(f"{field}: only with return_token_logprobs", param=field)
        if self.window == "half" and self.lengths is not None:
            raise RequestError("lengths: cannot be combined with window 'half'", param="lengths")
        if self.reference is not None and len(self.reference) != len(self.input):
            raise RequestError(
                f"reference: expected one entry for each of {len(self.input)} inputs, "
                f"got {len(self.reference)}",
                param="reference",
            )
        return self


class WindowSpan(Shape):
    """Input tokens start to end - 1 are read, those from score_from on are scored."""

    start: int
    end: int
    score_from: int
    num_scored: int


class WindowUsed(Shape):
    """What the windows of an input were made from, defaults filled in; null: the mode has no such setting."""

    mode: WindowMode | Literal["prefix"]
    """ "prefix": only the ladder's greatest length, at the beginning of the input."""
    context_length: int
    stride: int | None
    score_last: int | None


class BosUsed(Shape):
    """The token that an input begins with as the model reads it."""

    rule: BosRule
    """As asked for."""
    added: bool
    """Whether it was put before the input, rather than being part of it."""
    token_id: int | None
    """None: the input begins with no beginning-of-text token."""
    first_token_scored: bool
    """Whether the first token behind it, or the first of all where there is none, was scored."""


PositionEntry = TypedDict(
    "PositionEntry",
    {
        "from": int,
        "to": int,
        "num_scored": int,
        "nll_sum": float,
        "perplexity": float | None,
        "stderr": float | None,
    },
)
"""Scored tokens with `from` to `to` - 1 tokens of context before them."""


class LadderEntry(Shape):
    """The statistics of one context length."""

    length: int
    num_scored: int
    nll_sum: float
    perplexity: float | None
    stderr: float | None


class PairedDifferenceEntry(Shape):
    """NLLs less the reference's, over tokens that have both; below 0 is better than the reference."""

    num_paired: int
    nll_sum: float
    reference_nll_sum: float
    mean_difference: float | None
    """In nats a token."""
    stderr: float | None
    """Standard error of `mean_difference`."""
    perplexity_ratio: float | None
    """exp(mean_difference)."""


class CorpusDifference(PairedDifferenceEntry):
    """The same over all inputs."""

    stderr_between_inputs: float | None
    """Standard error of `mean_difference`, taking inputs as independent and not their tokens."""


class Totals(Shape):
    """Statistics of all scored tokens."""

    num_tokens: int
    num_scored: int
    nll_sum: float
    mean_nll: float | None
    perplexity: float | None
    stderr: float | None
    """Standard error of the perplexity, taking tokens as independent."""
    num_bytes: int
    """UTF-8 bytes of the scored tokens."""
    bits_per_byte: float | None
    num_words: int | None
    """Words of the text, counted as lm-eval does; null unless the input is a text of which every token was
    scored."""
    word_perplexity: float | None
    by_position: list[PositionEntry]
    ladder: list[LadderEntry]


class InputPerplexity(Totals):
    """The statistics of one input."""

    index: int
    bos: BosUsed
    window: WindowUsed
    windows: list[WindowSpan]
    paired_difference: NotRequired[PairedDifferenceEntry | None]
    token_ids: NotRequired[list[int] | str]
    token_logprobs: NotRequired[list[float | None] | str]
    top_logprobs: NotRequired[list[dict[str, float] | None]]


class Corpus(Totals):
    """The statistics of all inputs together."""

    stderr_between_inputs: float | None
    """Standard error of the perplexity, taking inputs as independent and not their tokens."""
    paired_difference: NotRequired[CorpusDifference]


class ReadTokensDetails(Shape):
    """What the windows cost: a token is read once by every window that holds it."""

    cached_tokens: int
    """Of `read_tokens`, those taken from the prefix cache."""
    read_tokens: int


class ScoringUsage(Usage):
    """Tokens of the inputs; none are generated."""

    prompt_tokens_details: ReadTokensDetails  # type: ignore[misc]


class Perplexity(Shape):
    """The answer."""

    id: str
    object: Literal["perplexity"]
    created: int
    model: str
    data: list[InputPerplexity]
    corpus: Corpus
    usage: ScoringUsage


class RunningTotals(Shape):
    """Sums so far; windows that serve only the ladder are not part of them."""

    num_scored: int
    nll_sum: float
    perplexity: float | None


class InputProgress(RunningTotals):
    """How far one input has come."""

    windows_done: int
    windows_total: int


class Progress(Shape):
    """One event of a stream: a window, or a part of one that takes several steps, was read and scored."""

    object: Literal["perplexity.progress"]
    id: str
    index: int
    """The input's."""
    window: WindowSpan
    num_scored: int
    nll_sum: float
    """Of the window or part."""
    input: InputProgress
    """Of the input, so far."""
    corpus: RunningTotals
    """Of the request, so far."""
    windows_done: int
    windows_total: int
    tokens_done: int
    tokens_total: int
    """Of the request: tokens that windows read."""
