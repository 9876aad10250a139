"""What a backend and its caches are, and what most backends have in common.

Letters: T rows of a ragged batch, H heads, d head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from dape_kernels.decoder import Decoder, DecoderModules
from dape_kernels.encoding import Encoding
from dape_kernels.paged import RaggedBatch


class LayerCache(Protocol):
    """Keys and values of one layer; how a block is laid out is the backend's own affair."""

    @staticmethod
    def block_bytes(block_size: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block, keys and values with all that belongs to them."""
        ...

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Return a cache whose slots hold nothing yet."""
        ...

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        ...

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store keys and values [T, H, d] of new tokens in their slots, int64 [T]."""
        ...

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values [H, n, d] in slots, int64 [n]."""
        ...


Cache = TypeVar("Cache", bound=LayerCache)


class Backend(ABC, Generic[Cache]):
    """One way to compute attention."""

    name: ClassVar[str]
    """The name in `attention.BACKENDS`."""
    replayable: ClassVar[bool] = False
    """Whether `attend` can be captured in a graph: it takes batches with `live_positions`."""
    shardable: ClassVar[bool] = False
    """Whether `attend` takes batches with a `shard`, see `attention.shard_obstacle`."""
    cache: type[Cache]
    """What holds the keys and values of a layer."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line about what runs here, or why nothing does."""

    @abstractmethod
    def unsupported(
        self, encoding: Encoding, dtype: torch.dtype, device: torch.device, block_size: int
    ) -> str | None:
        """Return why layers with this encoding and cache cannot run here, None if they can."""

    @abstractmethod
    def prepare(self, encoding: Encoding, length: int, device: torch.device) -> Encoding:
        """Return an encoding with all that can be computed beforehand for contexts up to `length`."""

    def decoder(
        self,
        modules: DecoderModules,  # noqa: ARG002 (most run layers one by one)
        caches: Sequence[Cache],  # noqa: ARG002
        encodings: Sequence[Encoding],  # noqa: ARG002
        length: int,  # noqa: ARG002
    ) -> Decoder | None:
        """Return something that runs all layers in one call, None where layers are run one by one.

        Args:
            modules: what to run; their weights may be copied, so they can be given up afterwards.
            caches: of each layer, of the class `cache`.
            encodings: of each layer, made by `prepare`.
            length: of the longest context.
        """
        return None

    @abstractmethod
    def attend(
        self, query: Tensor, cache: Cache, batch: RaggedBatch, encoding: Encoding, workspace: int
    ) -> tuple[Tensor, Tensor]:
        """See `attention.paged_attention`."""
