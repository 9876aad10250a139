"""Ragged batches over a paged KV cache, as every backend sees them.

Letters: S sequences, T rows (new tokens of all sequences, one after another).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dape_kernels.memo import Memo


@dataclass(frozen=True, slots=True)
class KeyShard:
    """Which keys of every sequence one of several ranks holds: `stripe` adjacent blocks of every round.

    Block b of a sequence is held by rank b // stripe % ranks, so that all ranks hold and see about as many
    keys whatever the length, and a sequence grows without anything being moved.

    Raises:
        ValueError: a number is too small, or the rank is none of the ranks.
    """

    rank: int
    ranks: int
    stripe: int  # blocks

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.ranks < 1 or not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank is {self.rank}, expected 0 to ranks - 1, of {self.ranks} ranks")
        if self.stripe < 1:
            raise ValueError(f"stripe is {self.stripe} blocks, expected at least 1")

    def holds(self, block: Tensor) -> Tensor:
        """Return which blocks of a sequence, integers of any shape, are held here."""
        return block // self.stripe % self.ranks == self.rank

    def spans(self, length: int, block_size: int) -> list[range]:
        """Return the positions below `length` that are held here, rising."""
        stripe = self.stripe * block_size
        starts = range(self.rank * stripe, length, self.ranks * stripe)
        return [range(start, min(start + stripe, length)) for start in starts]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Which rows belong to which sequence, and where the sequence's keys lie.

    Prefill chunks, scoring rows and decode rows mix freely: sequence s has rows query_starts[s] to
    query_starts[s + 1], which are the last positions of its context_lens[s] tokens. Token p of the
    sequence lies in slot p % block_size of block block_tables[s, p // block_size]. Keys and values of
    the rows themselves are in the cache before attention is called.
    """

    query_starts: list[int]  # S + 1, rising from 0 to T
    context_lens: list[int]  # S, each at least the sequence's row count
    block_tables: Tensor  # int32 [S, blocks], padded with any valid block number
    block_size: int
    segments: Tensor | None = None
    """int64 [slots], the segment of the token in each slot, where encodings are `segmented`."""
    live_positions: Tensor | None = None
    """int32 [S], of sequences of one row each: its position, -1 for no row. Known on the device only, so that
    work captured once can be replayed for others; `context_lens` are upper limits then. See
    `Backend.replayable`."""
    shard: KeyShard | None = None
    """Which of the keys are here and attended to, where they are spread over ranks. Positions stay those in
    the whole sequence, and so do the places in `block_tables`, which name any valid block for those held
    elsewhere. See `Backend.shardable` and `distributed`."""
    memo: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)
    """What all layers of a step share."""

    def positions(self, sequence: int) -> range:
        """Return the positions of the rows of one sequence."""
        rows = self.query_starts[sequence + 1] - self.query_starts[sequence]
        end = self.context_lens[sequence]
        return range(end - rows, end)

    def slots(self) -> Tensor:
        """Return the cache slot of every row, int64 [T]: block * block_size + offset."""
        device = self.block_tables.device
        if self.live_positions is not None:
            sequence = torch.arange(len(self.live_positions), device=device)
            return self.key_slots(sequence, self.live_positions.long().clamp_min(0))
        starts = torch.tensor(self.query_starts, device=device)
        sequence = torch.repeat_interleave(starts.diff())
        shift = torch.tensor(self.context_lens, device=device) - starts[1:]
        return self.key_slots(sequence, torch.arange(len(sequence), device=device) + shift[sequence])

    def key_slots(self, sequence: Tensor, position: Tensor) -> Tensor:
        """Return the cache slots, int64, of positions of sequences: two int64 tensors that broadcast."""
        block = self.block_tables[sequence, position // self.block_size].long()
        return block * self.block_size + position % self.block_size
