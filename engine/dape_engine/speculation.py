"""Speculative decoding without a second model: the text itself proposes how it goes on.

What followed the last few tokens when they stood in the text before is proposed to follow them again (prompt
lookup). The rows of proposed tokens are computed in the step that computes the last known token's row, every
row is drawn from as in plain decoding, and tokens are kept as long as they equal the proposed ones. That is
rejection sampling (Leviathan et al. 2023, algorithm 1) for a proposal that is certain of its token: the
token x is accepted with probability p(x), and what comes instead of it is drawn from p without x. So the
texts are those of plain decoding, whatever is proposed, and with a seed even the same ones.

Rows of proposed tokens are not free. Each text knows how often its proposals were right, the engine knows
what its steps have cost, and only as many tokens are verified as promise more tokens a second.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dape_engine.request import TokenLogprob
from dape_engine.sequence_blocks import SequenceBlocks
from dape_engine.step import Chunk

MAX_TOKENS = 16
"""Most tokens that are proposed at once, and longest run of tokens that is looked up."""
CANDIDATES = 16
"""Places of the text that are compared with its end, the latest first."""
MEMORY = 0.95
"""What an observation counts after one more of the same kind."""
UNLIKELY = 0.05
"""Chance below which a token is not worth a thought."""
MARGIN = 1.05
"""By how much more tokens a second a proposal must promise: what is promised is an estimate."""
FORGOTTEN = 256
"""Steps after which the cost of a number of rows is no longer known: texts have grown, others have come."""
NEWEST = 0.3
"""Weight of the newest cost."""


class SpeculativeConfig(BaseModel):
    """How proposals are made; vLLM's names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    method: Literal["ngram"] = "ngram"
    """What followed the last tokens before is proposed again."""
    num_speculative_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 5
    """Most tokens proposed at once; 0: none."""
    prompt_lookup_min: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 2
    """Last tokens that must have stood in the text before."""
    prompt_lookup_max: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 5
    """Last tokens that are compared with earlier ones: the longer the equal part, the better the proposal."""

    @model_validator(mode="after")
    def _ordered(self) -> SpeculativeConfig:
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise PydanticCustomError(
                "lookup_range",
                "prompt_lookup_max {most} is below prompt_lookup_min {least}",
                {"most": self.prompt_lookup_max, "least": self.prompt_lookup_min},
            )
        return self


class PromptLookup:
    """Proposes how one text goes on, and learns from the text how often that is right.

    The places of every run of `prompt_lookup_min` tokens are chained, the latest first. How likely a
    proposed token is depends on how many tokens before it are equal to those before the place it is from,
    up to `prompt_lookup_max`; a token that comes as proposed makes them one more.
    """

    def __init__(self, config: SpeculativeConfig):
        self._count = config.num_speculative_tokens
        self._least, self._most = config.prompt_lookup_min, config.prompt_lookup_max
        self._latest: dict[tuple[int, ...], int] = {}
        # Where the run that ends at token `_least + index` has ended before, 0: nowhere.
        self._earlier = array("q")
        # By the number of equal tokens: proposed tokens that were right, and all, as if one of two had been.
        self._right = [1.0] * (self._most + 1)
        self._all = [2.0] * (self._most + 1)
        self._place = 0
        self._equal = 0
        self._proposed: list[int] = []

    def propose(self, tokens: list[int]) -> tuple[list[int], list[float]]:
        """Return tokens that may follow a text, and the chance of each that it and those before it do.

        Args:
            tokens: those of the last call and what has followed since.
        """
        self._learn(tokens)
        self._index(tokens)
        found, equal = self._longest_match(tokens)
        # A text that repeats itself goes on repeating itself beyond its own end.
        period = len(tokens) - found
        self._proposed = [tokens[found + i % period] for i in range(self._count)] if found else []
        self._place, self._equal = len(tokens), equal
        chance, chances = 1.0, []
        for ahead in range(len(self._proposed)):
            size = min(equal + ahead, self._most)
            chance *= self._right[size] / self._all[size]
            if chance < UNLIKELY:
                break
            chances.append(chance)
        return self._proposed[: len(chances)], chances

    def _learn(self, tokens: list[int]) -> None:
        """Compare the last proposal, verified or not, with what has come."""
        for ahead, (proposed, came) in enumerate(zip(self._proposed, tokens[self._place :], strict=False)):
            size = min(self._equal + ahead, self._most)
            self._right[size] = MEMORY * self._right[size] + (proposed == came)
            self._all[size] = MEMORY * self._all[size] + 1
            if proposed != came:
                return

    def _index(self, tokens: list[int]) -> None:
        least = self._least
        for end in range(least + len(self._earlier), len(tokens) + 1):
            run = tuple(tokens[end - least : end])
            self._earlier.append(self._latest.get(run, 0))
            self._latest[run] = end

    def _longest_match(self, tokens: list[int]) -> tuple[int, int]:
        """Return where the longest run that also ends the text has ended before, and its length, else 0."""
        best, longest = 0, 0
        end = self._earlier[-1] if self._earlier else 0
        for _ in range(CANDIDATES):
            if not end:
                break
            size = self._least
            while size < min(self._most, end) and tokens[end - 1 - size] == tokens[-1 - size]:
                size += 1
            if size > longest:
                best, longest = end, size
            if size == self._most:
                break
            end = self._earlier[end - self._least]
        return best, longest


class RowCosts:
    """The seconds of steps that only decode, by their rows, from those of late."""

    def __init__(self) -> None:
        # By rows: seconds, and the step that measured them last; in the order of these steps.
        self._known: dict[int, tuple[float, int]] = {}
        self._rows: list[int] = []
        self._steps = 0

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        self._steps += 1
        before = self._known.pop(rows, None)
        blended = seconds if before is None else before[0] + NEWEST * (seconds - before[0])
        self._known[rows] = (blended, self._steps)
        while self._known[oldest := next(iter(self._known))][1] <= self._steps - FORGOTTEN:
            del self._known[oldest]
        self._rows = sorted(self._known)

    def seconds(self, rows: int) -> float:
        """Return what a step of so many rows is expected to take, on the scale of what was observed.

        Between two known numbers of rows a straight line; beyond them the square root of the rows, dearer
        than nothing and cheaper than in proportion, so that more are tried step by step where they may pay.
        """
        if not self._rows:
            return math.sqrt(rows)
        nearest = min(max(rows, self._rows[0]), self._rows[-1])
        if rows != nearest or rows in self._known:
            return self._known[nearest][0] * math.sqrt(rows / nearest)
        place = bisect_left(self._rows, rows)
        below, above = self._rows[place - 1], self._rows[place]
        share = (rows - below) / (above - below)
        return (1 - share) * self._known[below][0] + share * self._known[above][0]


class Speculator:
    """Adds proposed tokens to the chunks of decoding sequences.

    Args:
        blocks: gives those for their rows.
        max_num_batched_tokens: rows of a step.
    """

    def __init__(self, blocks: SequenceBlocks, max_num_batched_tokens: int):
        self._blocks = blocks
        self._max_rows = max_num_batched_tokens
        self._costs = RowCosts()
        self._is_used = False

    def extend(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return the chunks of a step with the proposed tokens that are worth their rows."""
        proposals: dict[int, tuple[list[int], list[float]]] = {}
        self._is_used = False
        for index, chunk in enumerate(chunks):
            sequence = chunk.sequence
            if sequence.lookup is None or sequence.sampling is None or not sequence.is_decoding:
                continue
            self._is_used = True
            tokens, chances = sequence.lookup.propose(sequence.tokens)
            # The token behind the last proposed one is drawn as well.
            if room := sequence.sampling.max_tokens - sequence.num_generated - 1:
                proposals[index] = tokens, chances[:room]
        if not any(chances for _, chances in proposals.values()):
            return chunks
        extended = list(chunks)
        for index, count in self._worthwhile(chunks, proposals).items():
            extended[index] = self._blocks.propose(chunks[index], proposals[index][0][:count])
        return extended

    def observe(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """Learn from the chunks of a step, not yet committed, that took so long."""
        if self._is_used and all(chunk.sequence.is_decoding for chunk in chunks):
            self._costs.observe(sum(chunk.count for chunk in chunks), seconds)

    def _worthwhile(
        self, chunks: list[Chunk], proposals: dict[int, tuple[list[int], list[float]]]
    ) -> dict[int, int]:
        """Return how many tokens of each proposal to verify for most expected tokens a second."""
        rows = sum(chunk.count for chunk in chunks)
        expected = float(sum(chunk.sequence.is_decoding for chunk in chunks))
        best, taken = MARGIN * expected / self._costs.seconds(rows), 0
        ranked = sorted((-chance, index) for index, (_, chances) in proposals.items() for chance in chances)
        ranked = ranked[: self._max_rows - rows]
        for count, (less_chance, _) in enumerate(ranked, 1):
            expected -= less_chance
            rate = expected / self._costs.seconds(rows + count)
            if rate > best:
                best, taken = rate, count
        counts: dict[int, int] = {}
        for _, index in ranked[:taken]:
            counts[index] = counts.get(index, 0) + 1
        return counts


def verified(drawn: Sequence[TokenLogprob], proposed: Sequence[int]) -> list[TokenLogprob]:
    """Return the drawn tokens that stand behind nothing but themselves.

    Args:
        drawn: one token per row: behind the last known token, then behind every proposed one.
        proposed: what all rows but the first have read.
    """
    accepted = 0
    while accepted < len(proposed) and drawn[accepted].token_id == proposed[accepted]:
        accepted += 1
    return list(drawn[: accepted + 1])
