"""Sequences whose keys are spread over ranks, for the tests of key-parallel attention."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dape_kernels.backend import Backend
from dape_kernels.distributed import write_held
from dape_kernels.encoding import Encoding
from dape_kernels.paged import KeyShard, RaggedBatch
from layers import Layer, Paged, random_encoding, random_sequence

Sequences = list[tuple[Tensor, Tensor, Tensor]]
# (context length, rows): a chunk, a first token, decode rows, a chunk that ends in a stripe, a whole prompt.
SPANS = [(517, 37), (1, 1), (300, 1), (97, 9), (129, 129), (450, 1)]
HEADS, HEAD_DIM = 3, 8


def random_sequences(dtype: torch.dtype, seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    return [random_sequence(rows, length, HEADS, HEAD_DIM, dtype, generator) for length, rows in SPANS]


def shard_encoding(layer: Layer, dtype: torch.dtype) -> Encoding:
    """A layer's score function; in float32 with scores of the usual size, whose rounding errors are small."""
    return random_encoding(layer, HEADS, HEAD_DIM, dtype, std=None if dtype == torch.float32 else 0.5)


def page_shard(
    backend: Backend[Any],
    sequences: Sequences,
    block_size: int,
    shard: KeyShard,
    cache_dtype: torch.dtype | None = None,
) -> Paged:
    """Put what a rank holds into a cache that has room for nothing else, but for one block of NaN.

    The blocks lie in no order, and whatever is held elsewhere is said to be in the block of NaN.
    """
    lengths = [key.shape[2] for _, key, _ in sequences]
    starts = [0, *accumulate(lengths)]
    most = -(-max(lengths) // block_size)
    held = [shard.holds(torch.arange(-(-length // block_size))).nonzero()[:, 0] for length in lengths]
    count = sum(map(len, held))
    order = torch.randperm(count + 1, generator=torch.Generator().manual_seed(shard.rank))
    tables = torch.full((len(lengths), most), int(order[-1]), dtype=torch.int32)
    for row, (blocks, numbers) in enumerate(zip(held, order[:-1].split(list(map(len, held))), strict=True)):
        tables[row, blocks] = numbers.to(torch.int32)
    dtype = sequences[0][1].dtype
    cache = backend.cache.allocate(
        count + 1, block_size, HEADS, HEAD_DIM, cache_dtype or dtype, torch.device("cpu")
    )
    nothing = torch.full(((count + 1) * block_size, HEADS, HEAD_DIM), float("nan"), dtype=dtype)
    cache.write(nothing, nothing, torch.arange(len(nothing)))

    def flat(index: int) -> Tensor:
        return torch.cat([sequence[index][0].transpose(0, 1) for sequence in sequences])

    write_held(cache, flat(1), flat(2), RaggedBatch(starts, lengths, tables, block_size, shard=shard))
    rows = [query.shape[2] for query, _, _ in sequences]
    batch = RaggedBatch([0, *accumulate(rows)], lengths, tables, block_size, shard=shard)
    return Paged(flat(0), cache, batch, sequences)
