"""What goes into the engine and what comes out of it: plain frozen data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dape_engine.grammar import Constraint
    from dape_engine.speculation import SpeculativeConfig

FinishReason = Literal["stop", "length", "abort"]
TIMED_OUT = "timeout"
"""Stop reason of a text that ended at its deadline; its finish reason is "length"."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one completion is drawn. Values are checked at the HTTP or command-line boundary."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """Number of most likely alternatives reported per generated token; None reports none at all."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens whose log-probabilities are reported beside the most likely ones."""
    allowed_token_ids: tuple[int, ...] = ()
    """Only these tokens are drawn; empty allows all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are never completed."""


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Where a request stands among the others, and how long it may take."""

    priority: int = 0
    """Lower goes first; anything above 0 is background work."""
    tenant: str = ""
    """Tenants share the engine evenly, however many requests each has."""
    cache_salt: str = ""
    """Requests share cached prefixes only with those of the same salt."""
    deadline: float | None = None
    """Second of the monotonic clock at which the request ends, finished or not."""


BACKGROUND = Scheduling(priority=1)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and one completion; `n` completions are `n` requests that share the prompt's blocks."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    prompt_logprobs: int | None = None
    """As `SamplingParams.logprobs`, for every prompt token but the first."""
    scheduling: Scheduling = Scheduling()
    constraint: Constraint | None = None
    """What the text must match, compiled for this one completion."""
    speculation: SpeculativeConfig | None = None
    """How tokens are proposed; None: as the engine does for all."""
    report_progress: bool = False
    """Also yield an output without tokens after each step that reads a part of the prompt."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens start to end of the input are read; tokens from `score_from` to end are scored.

    Indices into the input; start < score_from < end. Token `score_from` is predicted from tokens
    start to score_from - 1.
    """

    start: int
    end: int
    score_from: int


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Log-probabilities of the tokens of one input, window by window."""

    request_id: str
    token_ids: tuple[int, ...]
    windows: tuple[Window, ...]
    top_logprobs: int = 0
    scheduling: Scheduling = BACKGROUND
    in_pieces: bool = False
    """Yield what is known of a window after each step, as scores of windows that begin where it begins.

    The first piece is scored from where the window is, every other one from the end of the last; that of a
    piece that only reads is its end. The last one ends where the window ends.
    """


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token and of the most likely alternatives at its place."""

    token_id: int
    logprob: float
    """Natural logarithm, of the model's distribution before temperature, penalties and filters."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first; then those of `logprob_token_ids`, as asked for."""
    rank: int = 0
    """Of a prompt's token: 1 + the number of more likely ones. 0: not counted, as of drawn tokens."""


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How much of a prompt has been read."""

    total: int
    """Tokens of the prompt."""
    cached: int
    """Of these, taken from the prefix cache."""
    processed: int
    """Of these, read so far, cached ones included."""
    seconds: float
    """Since the request arrived."""


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """What one request gained since its last output; the last one has a finish reason."""

    text: str
    """New text, complete characters only; text that may turn into a stop string is held back."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token of `token_ids` where log-probabilities were asked for."""
    text_offsets: tuple[int, ...] = ()
    """Where the text of each new token begins within the text generated so far."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """With the first output where asked for: one per prompt token, None for the first."""
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or token id that ended the text, or `TIMED_OUT`; None for the end-of-text token."""
    progress: PromptProgress | None = None
    """With `report_progress`; such an output has neither text nor tokens."""


@dataclass(frozen=True, slots=True)
class WindowScores:
    """Scores of one window: entry t belongs to input token window.score_from + t."""

    window: Window
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """Per scored token, as `TokenLogprob.top`, where alternatives were asked for."""
    num_cached_tokens: int = 0
    """Tokens of the window taken from the prefix cache."""


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Monotonic clock readings of one request, in seconds."""

    queued: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Facts about one finished request, for metrics."""

    kind: Literal["generate", "score", "inspect"]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    num_scored_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    max_tokens: int
    times: RequestTimes


@dataclass(frozen=True, slots=True)
class StepStats:
    """Facts about one engine step, for metrics."""

    seconds: float
    num_tokens: int
    num_prefill_tokens: int
    num_generated_tokens: int
    num_scored_tokens: int
    num_preempted: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache by requests first scheduled in this step."""
    prefix_hits: int
    inter_token_seconds: tuple[float, ...] = field(default=())
    """Time since the previous token, one per sequence that gained tokens after its first."""
    model_seconds: float = 0.0
    """Of `seconds`, those of the model, the sampler and the scorer."""
    drafts: tuple[tuple[int, int], ...] = ()
    """Tokens proposed and, of these, accepted, one per sequence with a proposal."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """A snapshot of the engine for health and gauges; reading it never waits for the engine."""

    running: int
    waiting: int
    waiting_tokens: int
    """Rows that waiting sequences may need in all."""
    free_blocks: int
    total_blocks: int
    cached_blocks: int
    """Blocks that hold a reusable prefix and no running request; counted in `free_blocks`."""
    steps: int
    seconds_since_progress: float
    """Time since the last step ended while there was work; 0 when idle."""
    stopped: bool
    failure: str | None = None
