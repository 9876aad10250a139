"""Key-parallel attention: the keys and values of a sequence are spread over the ranks of a process group.

Every rank has all queries and attends to its own keys at their true positions; one all-gather a layer, and
every rank merges the partial outputs by their log-sum-exps. That is exact where a score depends on its own
query and key only. Letters: W ranks, T rows of a batch, H heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from dape_kernels.attention import paged_attention
from dape_kernels.backend import Backend, LayerCache
from dape_kernels.encoding import Encoding
from dape_kernels.paged import KeyShard, RaggedBatch


def own_shard(stripe: int, group: distributed.ProcessGroup | None = None) -> KeyShard:
    """Return what this process holds.

    Args:
        stripe: adjacent blocks of a sequence that a rank holds. Long ones are read in longer runs, short
            ones spread short sequences more evenly.
        group: of all ranks; the default group if None.
    """
    return KeyShard(distributed.get_rank(group), distributed.get_world_size(group), stripe)


def write_held(cache: LayerCache, key: Tensor, value: Tensor, batch: RaggedBatch) -> None:
    """Store those of the new keys and values [T, H, d] of a batch that this rank holds.

    Raises:
        ValueError: the batch has no shard.
    """
    shard = _shard(batch)

    def make() -> tuple[Tensor, Tensor]:
        spans = [batch.positions(sequence) for sequence in range(len(batch.context_lens))]
        position = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        rows = shard.holds(position // batch.block_size).nonzero()[:, 0].to(batch.block_tables.device)
        return rows, batch.slots()[rows]

    rows, slots = batch.memo("held rows", make)
    cache.write(key[rows], value[rows], slots)


def key_parallel_attention(
    query: Tensor,
    cache: LayerCache,
    batch: RaggedBatch,
    encoding: Encoding,
    *,
    backend: Backend[Any],
    workspace: int,
    group: distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention to keys that all ranks hold together. All ranks call it with the same rows.

    Args:
        query: [T, H, d], the same on every rank, rotated already where the encoding is rotary.
        cache: of this rank; see `write_held`.
        batch: the same on every rank but for its block tables and its `shard`.
        encoding, backend, workspace: see `paged_attention`.
        group: of all ranks; the default group if None.

    Returns:
        The output [T, H, d] and the log-sum-exp [T, H], the same bit by bit on every rank.

    Raises:
        ValueError: the batch has no shard or another group's, or see `paged_attention`.
    """
    shard = _shard(batch)
    ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
    if (shard.rank, shard.ranks) != (rank, ranks):
        raise ValueError(
            f"shard is of rank {shard.rank} of {shard.ranks}, expected that of rank {rank} of {ranks}"
        )
    output, lse = paged_attention(query, cache, batch, encoding, backend=backend, workspace=workspace)
    part = torch.cat([output.to(lse.dtype), lse[..., None]], -1)
    parts = part.new_empty(ranks, *part.shape)
    distributed.all_gather(list(parts), part, group=group)
    output, lse = merge(parts[..., :-1], parts[..., -1])
    return output.to(query.dtype), lse


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention to W disjoint sets of keys into attention to all of them.

    Args:
        outputs: [W, T, H, d], of any finite numbers where the log-sum-exp is minus infinity.
        lses: [W, T, H]; no row may have minus infinity in all of them.

    Returns:
        The output [T, H, d] and the log-sum-exp [T, H].
    """
    total = lses.logsumexp(0)
    weights = (lses - total).exp_()
    return torch.einsum("wth,wthd->thd", weights, outputs), total


def gathered_bytes(rows: int, heads: int, head_dim: int, ranks: int) -> int:
    """Return the bytes that each rank sends, and receives, for one layer of float32 or narrower queries."""
    return (ranks - 1) * rows * heads * (head_dim + 1) * torch.float32.itemsize


def _shard(batch: RaggedBatch) -> KeyShard:
    if batch.shard is None:
        raise ValueError("batch has no shard, which says what keys this rank holds")
    return batch.shard
