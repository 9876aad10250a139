"""A batch as the library reads it. Letters: S sequences."""

from __future__ import annotations

import torch

from dape_kernels.cpu.cache import PanelCache
from dape_kernels.cpu.library import PANEL, AttentionStruct
from dape_kernels.paged import RaggedBatch


class Layout:
    """The rows of a batch, checked against a cache: what all layers of a step share.

    Raises:
        ValueError: the batch contradicts itself or does not fit the cache.
    """

    def __init__(self, batch: RaggedBatch, cache: PanelCache):
        self.query_starts = torch.tensor(batch.query_starts)
        self.context_lens = torch.tensor(batch.context_lens)
        self.block_tables = batch.block_tables.to(torch.int32).contiguous()
        self.rows = batch.query_starts[-1]
        self.longest = max(batch.context_lens)
        counts = self.query_starts.diff()
        if batch.query_starts[0] != 0 or (counts < 0).any() or (counts > self.context_lens).any():
            raise ValueError(f"query_starts {batch.query_starts} do not fit contexts {batch.context_lens}")
        if batch.block_size != cache.block_size:
            raise ValueError(f"the batch has blocks of {batch.block_size}, the cache of {cache.block_size}")
        if self.block_tables.shape[1] * batch.block_size < self.longest:
            raise ValueError(f"block_tables are too narrow for a context of {self.longest}")
        if not 0 <= int(self.block_tables.min()) <= int(self.block_tables.max()) < cache.num_blocks:
            raise ValueError(f"block_tables name a block outside of 0 to {cache.num_blocks - 1}")

    @classmethod
    def of(cls, batch: RaggedBatch, cache: PanelCache) -> Layout:
        """Return the layout of a batch, made and checked once."""
        return batch.memo("cpu", lambda: cls(batch, cache))


def batch_struct(layout: Layout, batch: RaggedBatch) -> AttentionStruct:
    """Return a call with the rows of a batch and the number of threads; its caller adds the rest."""
    return AttentionStruct(
        threads=torch.get_num_threads(),
        sequences=len(layout.context_lens),
        query_starts=layout.query_starts.data_ptr(),
        context_lens=layout.context_lens.data_ptr(),
        block_tables=layout.block_tables.data_ptr(),
        table_stride=layout.block_tables.stride(0),
        panels_per_block=batch.block_size // PANEL,
    )
