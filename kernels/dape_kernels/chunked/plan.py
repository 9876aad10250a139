"""How a ragged batch is cut into tiles that fit a workspace; computed once per step, not per layer.

Rows are walked in groups: G lanes of R query rows each, aligned at their newest row. A long context is a
lane alone, walked in several tiles from the diagonal backwards; shorter ones share a tile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dape_kernels.chunked.tile import Tile
from dape_kernels.paged import RaggedBatch

# Most rows of a lane. A CPU also leaves all of a workspace above CPU_WORKSPACE unused: larger tiles are
# slower there, as they leave its caches, while an accelerator wants few large ones.
CPU_ROWS, OTHER_ROWS = 64, 256
CPU_WORKSPACE = 8 << 20
# With fewer keys than this, a tile costs more to set up than to compute.
FEWEST_KEYS = 32
# A lane with less than half the keys of the first one of its group is padded to them only up to this
# number, for the same reason.
PADDED_KEYS = 128


@dataclass(frozen=True, slots=True)
class Budget:
    """A workspace and what a tile takes of it, all in bytes."""

    workspace: int
    per_row: int  # one query of all heads
    per_key: int  # one key or value of all heads
    per_pair: int  # one score of all heads with what belongs to it
    reach: int  # score columns on each side of a tile that its adapted scores depend on
    device: str

    def keys(self, lanes: int, rows: int) -> int:
        """Return how many keys per lane a tile may have; less than 1 if the workspace is too small."""
        usable = min(self.workspace, CPU_WORKSPACE) if self.device == "cpu" else self.workspace
        free = usable // lanes - rows * self.per_row
        keys = free // (self.per_key + rows * self.per_pair) - 2 * self.reach
        return keys // 16 * 16 or keys

    def rows(self) -> int:
        """Return the most rows a lane may have. Raises ValueError if not even one row and key fit."""
        rows = CPU_ROWS if self.device == "cpu" else OTHER_ROWS
        while rows > 1 and self.keys(1, rows) < max(rows, FEWEST_KEYS):
            rows //= 2
        if self.keys(1, rows) < 1:
            needed = self.per_row + (1 + 2 * self.reach) * (self.per_key + self.per_pair)
            raise ValueError(f"attention workspace is {self.workspace} bytes, at least {needed} are needed")
        return rows


@dataclass(frozen=True, slots=True)
class Runs:
    """The blocks of one sequence and where they stop being consecutive."""

    blocks: list[int]
    breaks: list[int]  # breaks[b]: how many of blocks 1 to b do not follow the one before
    block_size: int

    @classmethod
    def of(cls, blocks: list[int], block_size: int) -> Runs:
        """Return the runs of a block table."""
        breaks = [0]
        for before, block in pairwise(blocks):
            breaks.append(breaks[-1] + (block != before + 1))
        return cls(blocks, breaks, block_size)

    def slots(self, first: int, last: int) -> slice | None:
        """Return positions `first` to `last` as one range of slots, None if they are scattered."""
        low, high = first // self.block_size, last // self.block_size
        if self.breaks[low] != self.breaks[high]:
            return None
        start = self.blocks[low] * self.block_size + first % self.block_size
        return slice(start, start + last - first + 1)


@dataclass(frozen=True, slots=True)
class Lane:
    """Query rows of one sequence: rows `row` to `row + count` of the batch, the newest at `last`."""

    sequence: int
    row: int
    count: int
    last: int
    context: int


@dataclass(frozen=True, slots=True)
class Group:
    """Lanes that share one tile, the one with most keys first; or one lane with several tiles."""

    lanes: int  # G
    rows: int  # R
    keys: int  # of a tile
    longest: int  # keys of the first lane
    shortest: int  # keys of the last lane
    sources: Tensor  # int64 [G * R], row of the batch at each place; places without a row repeat another
    targets: Tensor  # int64 [G * R], the same, but T (one more than the last row) at places without a row
    last: Tensor  # int64 [G], position of the newest row
    contexts: Tensor  # int64 [G], length of the whole sequence
    slots: Tensor  # int64 [G, reach + longest + reach], aligned at the newest row; outside it any of them
    held: list[
        range
    ]  # of the `longest` positions, those whose keys are here; all but where a batch has a shard
    runs: Runs | None  # of a single lane
    reach: int
    # int64 [G, R] and [slots], the segments of rows and of what the cache holds, where the batch has them
    segments: tuple[Tensor, Tensor] | None

    def tiles(self) -> Iterator[Tile]:
        """Yield the tiles of the group, from the diagonal backwards."""
        for span in reversed(self.held):
            near, far = self.longest - span.stop, self.longest - span.start
            for start in range(near, far, self.keys):
                yield Tile(self, start, min(self.keys, far - start), self.reach)


def make_groups(batch: RaggedBatch, budget: Budget) -> list[Group]:
    """Cut a batch into groups whose tiles fit the budget."""
    buckets: defaultdict[int, list[Lane]] = defaultdict(list)
    for lane in _cut(batch, budget.rows()):
        buckets[(lane.count - 1).bit_length()].append(lane)
    # The lanes of one sequence see a prefix of the same keys, so they share one index.
    indices: dict[int, tuple[Tensor, Runs]] = {}
    return [
        _group(batch, lanes, budget, indices)
        for bucket in buckets.values()
        for lanes in _share(
            sorted(bucket, key=lambda lane: -lane.last), budget, alone=batch.shard is not None
        )
        if _held(batch, lanes)
    ]


def _cut(batch: RaggedBatch, most: int) -> Iterator[Lane]:
    """Cut the rows of each sequence into equal lanes of at most `most` rows."""
    for sequence, context in enumerate(batch.context_lens):
        start, span = batch.query_starts[sequence], batch.positions(sequence)
        parts = -(-len(span) // most)
        for part in range(parts):
            low, high = len(span) * part // parts, len(span) * (part + 1) // parts
            yield Lane(sequence, start + low, high - low, span.start + high - 1, context)


def _held(batch: RaggedBatch, lanes: list[Lane]) -> list[range]:
    """Return which positions up to the first lane's newest row have keys here."""
    length = lanes[0].last + 1
    return [range(length)] if batch.shard is None else batch.shard.spans(length, batch.block_size)


def _share(lanes: list[Lane], budget: Budget, *, alone: bool) -> Iterator[list[Lane]]:
    """Put lanes together whose keys fit into one tile, unless each is to be `alone`.

    They come with falling numbers of keys.
    """
    shared: list[Lane] = []
    for lane in lanes:
        if shared:
            longest = shared[0].last + 1
            rows = max(lane.count, *(other.count for other in shared))
            fits = not alone and budget.keys(len(shared) + 1, rows) >= longest
            if not fits or longest > max(2 * (lane.last + 1), PADDED_KEYS):
                yield shared
                shared = []
        shared.append(lane)
    if shared:
        yield shared


def _group(
    batch: RaggedBatch, lanes: list[Lane], budget: Budget, indices: dict[int, tuple[Tensor, Runs]]
) -> Group:
    longest, rows = lanes[0].last + 1, max(lane.count for lane in lanes)
    fields = [(lane.sequence, lane.row, lane.count, lane.last, lane.context) for lane in lanes]
    table = torch.tensor(fields, device=batch.block_tables.device)
    sequence, first, count, last, contexts = table.unbind(1)
    place = torch.arange(rows, device=table.device)
    row = first[:, None] + count[:, None] - 1 - place
    held = place < count[:, None]
    runs = None
    if len(lanes) == 1:
        key = lanes[0].sequence
        if key not in indices:
            whole = _slots(batch, sequence, contexts, lanes[0].context, budget.reach)
            indices[key] = whole, Runs.of(batch.block_tables[key].tolist(), batch.block_size)
        slots, runs = indices[key]
        slots = slots[:, : longest + 2 * budget.reach]
    else:
        slots = _slots(batch, sequence, last + 1, longest, budget.reach)
    sources = torch.where(held, row, first[:, None])
    segments = None
    if batch.segments is not None:
        segments = batch.segments[batch.slots()][sources], batch.segments
    return Group(
        lanes=len(lanes),
        rows=rows,
        keys=budget.keys(len(lanes), rows),
        longest=longest,
        shortest=lanes[-1].last + 1,
        sources=sources.flatten(),
        targets=torch.where(held, row, batch.query_starts[-1]).flatten(),
        last=last,
        contexts=contexts,
        slots=slots,
        held=_held(batch, lanes),
        runs=runs,
        reach=budget.reach,
        segments=segments,
    )


def _slots(batch: RaggedBatch, sequence: Tensor, lengths: Tensor, longest: int, reach: int) -> Tensor:
    """Return slots [G, reach + longest + reach] of the last `longest` of `lengths` positions."""
    offset = torch.arange(-longest - reach, reach, device=lengths.device)
    position = (lengths[:, None] + offset).clamp_min(0).minimum(lengths[:, None] - 1)
    return batch.key_slots(sequence[:, None], position)
