"""How whole sequences are cut into blocks of (query, key) pairs that stay in a processor's cache.

A block holds all keys that its queries can see, so that softmax, the convolutions of DAPE version 2 and the
sums of CoPE see whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Some query rows of some sequences, with all the keys that they can see, and perhaps a few more."""

    sequences: slice
    rows: slice
    keys: slice

    def future(self, device: torch.device) -> Tensor:
        """Return which pairs [R, K] lie above the diagonal."""
        rows = self.rows.stop - self.rows.start
        return torch.ones(rows, self.keys.stop, dtype=torch.bool, device=device).triu(self.rows.start + 1)


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Most pairs and query rows of a block."""

    pairs: int
    rows: int

    def groups(self, sequences: int, tokens: int, margin: int = 0) -> Iterator[list[Block]]:
        """Yield the blocks that share their rows, the last rows first; one row may exceed `pairs`.

        Args:
            sequences: of the batch.
            tokens: of each sequence.
            margin: columns beside the keys of a row that take memory like pairs.
        """
        # Few different shapes: for each, oneDNN compiles its bfloat16 products anew, in milliseconds.
        step = max(self.rows, -(-tokens // KEY_COUNTS))
        stop = tokens
        while stop:
            keys = min(tokens, -(-stop // step) * step)
            fitting = max(1, min(self.rows, self.pairs // (keys + margin)))
            rows = min(stop, 1 << (fitting.bit_length() - 1))
            together = max(1, self.pairs // (rows * (keys + margin)))
            yield [
                Block(
                    slice(first, min(first + together, sequences)), slice(stop - rows, stop), slice(0, keys)
                )
                for first in range(0, sequences, together)
            ]
            stop -= rows


# Most different numbers of keys that the blocks of one batch have.
KEY_COUNTS = 16
# With 8 heads and D = 32 a block takes 2 MB in bfloat16 on a CPU. oneDNN 3.12's bfloat16 product over the
# pairs divides by zero for some larger counts (57344 on processors with AMX). Accelerators want large blocks.
CPU_BLOCK = BlockSize(pairs=2**15, rows=32)
OTHER_BLOCK = BlockSize(pairs=2**20, rows=128)
