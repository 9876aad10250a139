"""A paged KV cache and ragged batches, as every backend sees them.

Letters: H heads, d head size, S sequences, T rows (new tokens of all sequences, one after another).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def positions(self, sequence: int) -> range:
        """Return the positions of the rows of one sequence."""
        rows = self.query_starts[sequence + 1] - self.query_starts[sequence]
        end = self.context_lens[sequence]
        return range(end - rows, end)

    def memo[T](self, key: Hashable, make: Callable[[], T]) -> T:
        """Return `make()`, computed once per batch: what all layers of one step share."""
        if key not in self._memo:
            self._memo[key] = make()
        result: T = self._memo[key]
        return result

    def slots(self) -> Tensor:
        """Return the cache slot of every row, int64 [T]: block * block_size + offset."""
        return self.memo("slots", self._row_slots)

    def _row_slots(self) -> Tensor:
        device = self.block_tables.device
        starts = torch.tensor(self.query_starts, device=device)
        sequence = torch.repeat_interleave(starts.diff())
        first = torch.tensor(self.context_lens, device=device) - starts[1:]
        position = torch.arange(self.query_starts[-1], device=device) + first[sequence]
        return self.key_slots(sequence, position)

    def key_slots(self, sequence: Tensor, position: Tensor) -> Tensor:
        """Return the cache slots, int64, of positions of sequences (two tensors that broadcast)."""
        block = self.block_tables[sequence, position // self.block_size].long()
        return block * self.block_size + position % self.block_size


@dataclass(frozen=True, slots=True)
class HeadMajorCache:
    """Keys and values of one layer as [H, slots, d], so that a run of slots is a matrix per head."""

    key: Tensor
    value: Tensor
    block_size: int

    @classmethod
    def allocate(
        cls, num_blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> HeadMajorCache:
        """Return a zeroed cache of `num_blocks` blocks of `block_size` tokens."""
        shape = (heads, num_blocks * block_size, head_dim)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)), block_size)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.key.shape[1] // self.block_size

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store keys and values [T, H, d] of new tokens in their slots, int64 [T]."""
        self.key[:, slots] = key.transpose(0, 1).to(self.key.dtype)
        self.value[:, slots] = value.transpose(0, 1).to(self.value.dtype)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values [H, n, d] of slots, int64 [n]."""
        return self.key.index_select(1, slots), self.value.index_select(1, slots)
