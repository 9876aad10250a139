"""The geometry of one tile: where its keys lie, how far they are, and which of them a row may see.

Letters: G lanes, R rows of a lane, n the distance from a query back to a key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from dape_kernels.chunked.plan import Group


@dataclass(frozen=True, slots=True)
class Tile:
    """The keys that lie `start` to `start + keys` - 1 before the newest row of each lane of a group.

    Columns run forwards over the keys, with `reach` more columns on both sides; rows run backwards from
    the newest. So row r and column c are `top` - r - c apart, in every lane.
    """

    group: Group
    start: int
    keys: int
    reach: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.keys + 2 * self.reach

    @property
    def top(self) -> int:
        """Distance of row 0 and column 0, the largest."""
        return self.start + self.keys + self.reach - 1

    @property
    def centre(self) -> Tile:
        """The tile without the columns beside it."""
        return replace(self, reach=0) if self.reach else self

    def slots(self) -> Tensor | slice:
        """Return the cache slots of the columns: int64 [G * width], or one range of them."""
        group = self.group
        first = group.longest - 1 - self.top
        if group.runs is not None and first >= 0 and first + self.width <= group.longest:
            run = group.runs.slots(first, first + self.width - 1)
            if run is not None:
                return run
        first += group.reach
        return group.slots[:, first : first + self.width].flatten()

    def distances(self) -> Tensor:
        """Return the distances in a tile, int64 [R + width - 1], falling; 0 above the diagonal."""
        count = self.group.rows + self.width - 1
        return torch.arange(self.top, self.top - count, -1, device=self.group.last.device).clamp_min_(0)

    def spread(self, strip: Tensor) -> Tensor:
        """Return the view [X, 1, R, width] of a function [X, R + width - 1] of `distances`."""
        strip = strip.contiguous()
        return strip.as_strided((len(strip), 1, self.group.rows, self.width), (strip.shape[1], 0, 1, 1))

    def look_up(self, table: Tensor, dtype: torch.dtype, above: float) -> Tensor:
        """Return the view [X, 1, R, width] of a table [X, distances], with `above` above the diagonal."""
        low = self.top + 2 - self.group.rows - self.width
        strip = table[:, max(low, 0) : self.top + 1].flip(1).to(dtype)
        return self.spread(functional.pad(strip, (0, -low), value=above) if low < 0 else strip)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the positions of queries [G, R, 1] and keys [G, 1, width]; some may be negative."""
        last = self.group.last[:, None, None]
        row = torch.arange(self.group.rows, device=last.device)[:, None]
        return last - row, last + torch.arange(-self.top, self.width - self.top, device=last.device)

    def segments(self) -> tuple[Tensor, Tensor]:
        """Return the segments of queries [G, R, 1] and keys [G, 1, width], where the batch has them."""
        assert self.group.segments is not None
        of_rows, of_slots = self.group.segments
        return of_rows[..., None], of_slots[self.slots()].view(self.group.lanes, 1, self.width)

    def hide_future_(self, values: Tensor, value: float) -> None:
        """Overwrite what lies above the diagonal in values [X, G, R, width]."""
        rows = self.group.rows
        # Row r may see the first top - r + 1 columns, so only the last few hold such pairs.
        first = max(self.top + 2 - rows, 0)
        if first < self.width:
            row = torch.arange(rows, device=values.device)[:, None]
            column = torch.arange(first, self.width, device=values.device)
            values[..., first:].masked_fill_(row + column > self.top, value)

    def hide_past_(self, values: Tensor, value: float) -> None:
        """Overwrite what lies left of position 0 in values [X, G, R, width]."""
        if self.top >= self.group.shortest:
            values.masked_fill_(self.positions()[1] < 0, value)
