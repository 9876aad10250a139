"""The cache of the Triton kernels: a token's heads side by side, so that a block is one run of memory.

Letters: T rows of a batch, H heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Keys and values of one layer, [slots, H, d]; int8 with one scale per token and head."""

    key: Tensor
    value: Tensor
    scales: Tensor | None  # float32 [2, slots, H], keys first; int8 only
    block_size: int

    @staticmethod
    def block_bytes(block_size: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block, keys and values with their scales."""
        scale = SCALE_BYTES if dtype == torch.int8 else 0
        return 2 * block_size * heads * (head_dim * dtype.itemsize + scale)

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> TokenCache:
        """Return a cache whose content is undefined."""
        slots = num_blocks * block_size
        key, value = torch.empty(2, slots, heads, head_dim, dtype=dtype, device=device)
        scales = torch.empty(2, slots, heads, device=device) if dtype == torch.int8 else None
        return cls(key, value, scales, block_size)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.key) // self.block_size

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store keys and values [T, H, d] of new tokens in their slots, int64 [T]."""
        from dape_kernels.triton.write import write

        write(self, key, value, slots)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values [H, n, d] in slots, int64 [n]; float32 of an int8 cache."""
        key, value = (plane.index_select(0, slots) for plane in (self.key, self.value))
        if self.scales is not None:
            key_scale, value_scale = (scale.index_select(0, slots)[..., None] for scale in self.scales)
            key, value = key * key_scale, value * value_scale
        return key.transpose(0, 1), value.transpose(0, 1)
