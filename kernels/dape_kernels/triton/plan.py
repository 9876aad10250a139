"""How a ragged batch is cut into the programs of the kernel; computed once per step, not per layer.

Sequences with few rows go row by row, the others in tiles, each kind in a launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dape_kernels.paged import RaggedBatch
from dape_kernels.triton.configs import Tiling

Item = tuple[int, int, int, int, int]
"""First row of the batch, rows, sequence, position of the first row, context length of the sequence."""
# Sequences with at most so many rows go row by row: a tile would be mostly empty.
FEW_ROWS = 4
MOST_SPLITS = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of the kernel: its items, and into how many parts the keys of each are split."""

    tiling: Tiling
    items: Tensor  # int32 [items, 5]
    splits: int


def cut(batch: RaggedBatch, rows: int, *, tiles: bool) -> list[Item]:
    """Return tiles of up to `rows` rows of the sequences with many rows, or single rows of the others.

    Those with most keys come first, so that none of them begins when the others are done.
    """
    found: list[Item] = []
    for sequence, context in enumerate(batch.context_lens):
        first, span = batch.query_starts[sequence], batch.positions(sequence)
        if (len(span) > FEW_ROWS) == tiles:
            for begin in range(0, len(span), rows):
                count = min(rows, len(span) - begin)
                found.append((first + begin, count, sequence, span.start + begin, context))
    return sorted(found, key=lambda item: -(item[3] + item[1]))


def split_count(
    programs: int, longest: int, keys: int, part_bytes: int, workspace: int, processors: int
) -> int:
    """Return into how many parts the keys of every item are split.

    Args:
        programs: of the launch without splits.
        longest: most keys of a sequence.
        keys: of a tile.
        part_bytes: float32 outputs of one part of all items.
        workspace: bytes for the parts.
        processors: that are to be kept busy, twice over.
    """
    wanted = -(-2 * processors // programs)
    # A part shorter than two tiles costs more to merge than it saves.
    useful = longest // (2 * keys)
    affordable = workspace // part_bytes
    return max(1, min(wanted, useful, affordable, MOST_SPLITS))


def work(batch: RaggedBatch, rows: int, *, tiles: bool) -> Tensor:
    """Return the items of a launch, int32 [items, 5], on the device of the batch."""
    if batch.live_positions is not None:
        return _live(batch.live_positions) if not tiles else batch.live_positions[:0]
    items = cut(batch, rows, tiles=tiles)
    return torch.tensor(items, dtype=torch.int32).to(batch.block_tables.device, non_blocking=True)


def _live(positions: Tensor) -> Tensor:
    """Return the items of single rows whose positions are known on the device only."""
    row = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
    there = (positions >= 0).to(torch.int32)
    last = positions.clamp_min(0)
    return torch.stack([row, there, row, last, last + 1], 1)
