"""Segments of BiPE: which one a token lies in, and how far inside it.

A segment ends with one of a set of tokens. What was found for a token is stored in its cache slot, beside its
keys, so that chunks, decode steps and shared prefixes go on where the tokens before them left off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dape_engine.step import Chunk
from dape_kernels.paged import RaggedBatch


def split_segments(
    token_ids: Tensor, ends: Tensor, segment: int = 0, inside: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the segment of each token and its position inside it, int64 [..., N].

    Args:
        token_ids: int64 [..., N].
        ends: int64, the tokens that end a segment.
        segment, inside: of the first token.
    """
    begins = functional.pad(torch.isin(token_ids, ends)[..., :-1], (1, 0))
    index = torch.arange(token_ids.shape[-1], device=token_ids.device)
    start = torch.where(begins, index, -inside).cummax(-1).values
    return segment + begins.cumsum(-1), index - start


class SegmentCache:
    """The segment of the token in every cache slot, and its position inside; one for all layers."""

    def __init__(self, num_slots: int, ends: Sequence[int], device: torch.device):
        self._ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self._known = frozenset(ends)
        self.segment = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.inside = torch.zeros_like(self.segment)

    def add(self, chunks: Sequence[Chunk], batch: RaggedBatch, token_ids: Tensor) -> Tensor:
        """Store what lies where of new tokens and return their positions inside their segments, int64 [T].

        Args:
            chunks: the rows; what was before each of them is stored already.
            batch: of these chunks.
            token_ids: int64 [T].
        """
        slots = batch.slots()
        for index, chunk in enumerate(chunks):
            rows = slice(*batch.query_starts[index : index + 2])
            first = self._after(chunk.sequence.tokens[chunk.start - 1], batch, index, chunk.start - 1)
            found = split_segments(token_ids[rows], self._ends, *first)
            for plane, values in zip((self.segment, self.inside), found, strict=True):
                plane[slots[rows]] = values
        return self.inside[slots]

    def _after(self, token: int, batch: RaggedBatch, sequence: int, position: int) -> tuple[int, int]:
        """Return where the token behind the one at `position` lies; -1: nothing is before it."""
        if position < 0:
            return 0, 0
        block = int(batch.block_tables[sequence, position // batch.block_size])
        slot = block * batch.block_size + position % batch.block_size
        segment, inside = int(self.segment[slot]), int(self.inside[slot])
        return (segment + 1, 0) if token in self._known else (segment, inside + 1)
