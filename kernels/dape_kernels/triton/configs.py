"""Tile sizes, warps and stages by device and kind of launch: a committed table, never tuned at run time.

`python -m dape_kernels.triton.tune` looks for better lines, by measuring on a GPU or else by what the
compiler says. **All lines so far come from the compiler**: no spilled registers where that is possible,
then the fewest instructions per pair, within the shared memory of the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode", "forward", "backward_keys", "backward_rows"]
TRAINING: tuple[Phase, ...] = ("forward", "backward_keys", "backward_rows")


@dataclass(frozen=True, slots=True)
class Tiling:
    """One way to cut the work of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Case:
    """What the best tiling depends on."""

    phase: Phase
    wide: bool = False
    """float32 instead of 16-bit products."""
    taps: int = 1
    """Kernel length of DAPE; 0 without."""
    large: bool = False
    """Head sizes above 64."""
    grouped: bool = False
    """More than 16 heads."""
    quantised: bool = False
    """An int8 cache."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table: the tiling of all cases that agree with what it names."""

    phase: Phase
    tiling: Tiling
    wide: bool | None = None
    convolved: bool | None = None
    large: bool | None = None
    grouped: bool | None = None
    quantised: bool | None = None

    def holds(self, case: Case) -> bool:
        """Return whether this line is for a case."""
        named = (
            (self.wide, case.wide),
            (self.convolved, case.taps > 1),
            (self.large, case.large),
            (self.grouped, case.grouped),
            (self.quantised, case.quantised),
        )
        return self.phase == case.phase and all(mine in (None, its) for mine, its in named)


# The first line that holds counts. 227 KiB of shared memory:
HOPPER = (
    Line("prefill", Tiling(16, 16, 8, 1), wide=True),
    Line("prefill", Tiling(16, 16, 8, 1), large=True, grouped=True),
    Line("prefill", Tiling(16, 32, 8, 1), convolved=True),
    Line("prefill", Tiling(16, 16, 8, 1), quantised=True),
    Line("prefill", Tiling(16, 16, 8, 2)),
    Line("decode", Tiling(1, 16, 8, 1), large=True, grouped=True),
    Line("decode", Tiling(1, 16, 8, 1), wide=True),
    Line("decode", Tiling(1, 16, 8, 1), large=True),
    Line("decode", Tiling(1, 32, 8, 1), grouped=True),
    Line("decode", Tiling(1, 32, 8, 1), quantised=True),
    Line("decode", Tiling(1, 32, 8, 2)),
    Line("forward", Tiling(16, 16, 8, 2)),
    Line("backward_keys", Tiling(16, 16, 8, 1)),
    Line("backward_rows", Tiling(16, 16, 8, 1)),
)
# 99 KiB:
SMALL = (
    Line("prefill", Tiling(16, 16, 8, 1)),
    Line("decode", Tiling(1, 16, 8, 1)),
)
TABLES: dict[tuple[int, int], tuple[Line, ...]] = {(9, 0): HOPPER, (10, 0): HOPPER}


def roomy(capability: tuple[int, int]) -> bool:
    """Return whether a device of this compute capability has room for large heads and for many."""
    return capability in TABLES


def choose(capability: tuple[int, int], case: Case) -> Tiling:
    """Return the tiling for a launch on a device of this compute capability."""
    lines = TABLES.get(capability, SMALL)
    return next(line.tiling for line in lines if line.holds(case))
