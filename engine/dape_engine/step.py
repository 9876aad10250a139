"""The work of one step, the budget that bounds it, and what comes of it."""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass, field

from torch import Tensor

from dape_engine.errors import StepError
from dape_engine.request import TokenLogprob
from dape_engine.sequence import Sequence
from dape_kernels.paged import RaggedBatch


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows start to start + count of a sequence; `sequence.blocks` has room for them."""

    sequence: Sequence
    start: int
    count: int
    proposed: tuple[int, ...] = ()
    """Tokens that may follow the known ones; as many of the rows, the last, are theirs."""

    @property
    def end(self) -> int:
        """Known tokens that are in the cache after it."""
        return self.start + self.count - len(self.proposed)

    @property
    def is_last(self) -> bool:
        """Whether it has the row of the sequence's last known token."""
        return self.end == self.sequence.num_rows


def pairs(chunk: Chunk) -> int:
    """Return the (query, key) pairs of a chunk."""
    return chunk.count * (2 * chunk.start + chunk.count + 1) // 2


@dataclass(frozen=True, slots=True)
class Step:
    """The work of one step, sequences in the order of their admission, and what led to it."""

    chunks: list[Chunk]
    preempted: list[Sequence]
    """They have run out of blocks and go on before all that wait."""
    yielded: list[Sequence]
    """They have made way for tenants of whom nothing ran, and wait first in the queue."""
    prefix_queries: int
    """Prompt tokens of the sequences admitted for the first time in this step."""
    prefix_hits: int
    """Prompt tokens that never preempted sequences took from the prefix cache in this step."""


@dataclass(slots=True)
class ChunkResult:
    """What one chunk of rows gave: log-probabilities of prompt tokens, and the next tokens at its end."""

    scored: list[TokenLogprob] = field(default_factory=list)
    """The tokens that follow the chunk's rows, from the first one wanted."""
    drawn: list[TokenLogprob] = field(default_factory=list)
    """Where the chunk ends the sequence and it generates: those proposed tokens that were drawn as well, one
    after another, and the next one."""
    error: StepError | None = None
    """What this chunk failed with, even when computed alone."""


@dataclass(slots=True)
class Pass:
    """Rows on their way through the layers."""

    number: int
    """Of all passes that the runner has begun."""
    chunks: abc.Sequence[Chunk]
    batch: RaggedBatch
    positions: Tensor
    hidden: Tensor
    """[T, h] behind the layers done so far."""
    num_done: int
    num_left: int
    """Layers."""


@dataclass(slots=True)
class Budget:
    """Rows and attention pairs that are left for the prefill chunks of a step."""

    rows: int
    pairs: int
    background_pairs: int
    """Of these, for background work."""

    def grant(self, start: int, wanted: int, background: bool, share: int = 1, least: int = 0) -> int:
        """Take up to `wanted` rows from position `start` on, out of one part in `share`.

        Row p attends to p + 1 keys. At least `least` rows are taken where rows are left and wanted,
        whatever pairs they cost.
        """
        odd = 2 * start + 1
        pairs = min(self.pairs, self.background_pairs) if background else self.pairs
        affordable = (math.isqrt(odd * odd + 8 * (pairs // share)) - odd) // 2
        count = max(min(self.rows // share, affordable), least)
        count = min(count, wanted, self.rows)
        taken = count * (odd + count) // 2
        self.rows -= count
        self.pairs = max(0, self.pairs - taken)
        if background:
            self.background_pairs = max(0, self.background_pairs - taken)
        return count
