"""The cache layout of the backends in PyTorch, and what else they have in common.

Letters: H heads, d head size, T rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dape_kernels.backend import Backend
from dape_kernels.encoding import Encoding

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class HeadMajorCache:
    """Keys and values of one layer as [H, slots, d], so that a run of slots is a matrix per head."""

    key: Tensor
    value: Tensor
    block_size: int

    @staticmethod
    def block_bytes(block_size: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block, keys and values."""
        return 2 * block_size * heads * head_dim * dtype.itemsize

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> HeadMajorCache:
        """Return an empty cache."""
        key, value = torch.zeros(2, heads, num_blocks * block_size, head_dim, dtype=dtype, device=device)
        return cls(key, value, block_size)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.key.shape[1] // self.block_size

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store keys and values [T, H, d] of new tokens in their slots, int64 [T]."""
        for plane, new in ((self.key, key), (self.value, value)):
            plane.index_copy_(1, slots, new.transpose(0, 1).to(plane.dtype))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values [H, n, d] in slots, int64 [n]."""
        return self.key.index_select(1, slots), self.value.index_select(1, slots)


class HeadMajorBackend(Backend[HeadMajorCache]):
    """Every encoding on every device that PyTorch has."""

    shardable = True
    cache = HeadMajorCache

    def describe(self) -> str:
        """Return one line about what runs here."""
        return f"PyTorch {torch.__version__}"

    def unsupported(
        self,
        encoding: Encoding,  # noqa: ARG002 (all are supported)
        dtype: torch.dtype,
        device: torch.device,  # noqa: ARG002
        block_size: int,  # noqa: ARG002
    ) -> str | None:
        """Return why a layer cannot run here, None if it can."""
        return None if dtype in DTYPES else f"does not support a cache of {dtype}"

    def prepare(self, encoding: Encoding, length: int, device: torch.device) -> Encoding:
        """Return an encoding with its tables for contexts up to `length`."""
        return encoding.with_tables(length, device)
