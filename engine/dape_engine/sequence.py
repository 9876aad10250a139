"""The mutable state of one request inside the engine: its tokens, its blocks, how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dape_engine.request import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from dape_engine.speculation import PromptLookup
    from dape_engine.step import Chunk


@dataclass(slots=True, eq=False)
class Sequence:
    """One run of tokens that grows by generation, or is read once for its log-probabilities, or both."""

    request_id: str
    tokens: list[int]
    """Prompt, then generated tokens."""
    sampling: SamplingParams | None = None
    """None: nothing is generated."""
    score_from: int | None = None
    """First token whose log-probability is wanted, at least 1; None: none of the prompt's."""
    priority: int = 0
    """Lower goes first; anything above 0 is background work."""
    top_logprobs: int = 0
    """Alternatives reported beside each of the prompt's log-probabilities."""
    tenant: str = ""
    cache_salt: str = ""
    """Goes into the prefix cache keys: only sequences of the same salt share blocks."""
    lookup: PromptLookup | None = None
    """Proposes how the text goes on; None: nothing is proposed."""
    prompt_length: int = field(init=False)
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix cache keys of its first full blocks, as far as known; kept by a preemption."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache; the next row is that of this position."""
    scored: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities known so far of the prompt's tokens from `score_from` on; kept by a preemption."""
    num_blocks_kept: int = 0
    """First blocks whose log-probabilities have been offered to the cache, or cannot be."""
    num_cached: int = 0
    """Tokens taken from the prefix cache since the sequence was last admitted."""
    num_preemptions: int = 0
    flight: Chunk | None = None
    """Its rows that are on their way through the layers, while they are."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def num_rows(self) -> int:
        """Rows to be computed in all, for now: the last token of a scored text is never read."""
        return len(self.tokens) if self.sampling is not None else len(self.tokens) - 1

    @property
    def max_rows(self) -> int:
        """Rows it can grow to: the last generated token is never read."""
        generated = self.sampling.max_tokens if self.sampling is not None else 0
        return self.num_rows if generated == 0 else self.prompt_length + generated - 1

    @property
    def num_scored(self) -> int:
        """Prompt tokens whose log-probabilities are known."""
        return len(self.scored)

    @property
    def num_remaining(self) -> int:
        """Rows still to be computed."""
        return self.num_rows - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def is_decoding(self) -> bool:
        """Whether the next row alone gives the next token of a text already begun."""
        return self.num_generated > 0 and self.num_remaining == 1

    @property
    def first_needed_row(self) -> int:
        """First row whose output is still wanted; rows before it may come from the prefix cache."""
        last = self.num_rows - 1
        if self.score_from is None or self.score_from + self.num_scored >= self.prompt_length:
            return last
        return self.score_from + self.num_scored - 1
