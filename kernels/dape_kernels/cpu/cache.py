"""The cache of the C++ kernels: panels of 16 keys in 32-bit words, laid out for vector loads.

Letters: H heads, d head size, T rows of a batch, G numbers in a word.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from dape_kernels.cpu.library import PANEL, STORAGE, CacheStruct, load

WORD = 4
FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PanelCache:
    """Keys and values of one layer in float32, bfloat16, or int8 with one scale per token and head."""

    key: Tensor  # int32 [panels, H, d / G, 16]
    value: Tensor  # int32 [panels, H, 16 / G, d rounded up to 16]
    scales: Tensor | None  # float32 [2, panels, H, 16], keys first; int8 only
    block_size: int
    struct: CacheStruct

    @staticmethod
    def block_bytes(block_size: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block, keys and values, with padding and scales."""
        words = sum(rows * columns for rows, columns in _panel_words(head_dim, dtype))
        scales = 2 * PANEL if dtype == torch.int8 else 0
        return block_size // PANEL * heads * (words + scales) * WORD

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,  # noqa: ARG003 (a CPU)
    ) -> PanelCache:
        """Return a cache whose content is undefined: memory is taken when a block is first written."""
        panels = num_blocks * block_size // PANEL
        key_words, value_words = _panel_words(head_dim, dtype)
        key = torch.empty(panels, heads, *key_words, dtype=torch.int32)
        value = torch.empty(panels, heads, *value_words, dtype=torch.int32)
        scales = torch.empty(2, panels, heads, PANEL) if dtype == torch.int8 else None
        struct = CacheStruct(
            key=key.data_ptr(),
            value=value.data_ptr(),
            key_scale=None if scales is None else scales[0].data_ptr(),
            value_scale=None if scales is None else scales[1].data_ptr(),
            panels=panels,
            heads=heads,
            head_dim=head_dim,
            storage=STORAGE[dtype],
        )
        return cls(key, value, scales, block_size, struct)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.key) * PANEL // self.block_size

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store keys and values [T, H, d] of new tokens in their slots, int64 [T].

        Raises:
            ValueError: a dtype, shape or stride that the kernel cannot read in place.
        """
        key, value = widen(key), widen(value)
        check_rows("key", key, self.struct)
        check_rows("value", value, self.struct)
        if key.dtype != value.dtype or len(key) != len(value):
            raise ValueError(f"key is {_text(key)} and value {_text(value)}, expected the same of both")
        _check_slots(slots, len(key))
        load().dape_write(
            byref(self.struct),
            key.data_ptr(),
            value.data_ptr(),
            STORAGE[key.dtype],
            *key.stride()[:2],
            *value.stride()[:2],
            slots.data_ptr(),
            len(slots),
            torch.get_num_threads(),
        )

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 copies of the keys and values [H, n, d] in slots, int64 [n]."""
        _check_slots(slots, slots.numel())
        key, value = torch.empty(2, self.struct.heads, len(slots), self.struct.head_dim)
        load().dape_read(byref(self.struct), slots.data_ptr(), len(slots), key.data_ptr(), value.data_ptr())
        return key, value


def widen(rows: Tensor) -> Tensor:
    """Return float16 rows in float32, others as they are: the kernels have no float16."""
    return rows.float() if rows.dtype == torch.float16 else rows


def check_rows(name: str, rows: Tensor, struct: CacheStruct) -> None:
    """Check that rows [T, H, d] can be read in place. Raises ValueError if not."""
    shape = (len(rows), struct.heads, struct.head_dim)
    if rows.dtype not in FLOATS or rows.shape != shape or rows.stride(-1) != 1 or rows.device.type != "cpu":
        raise ValueError(
            f"{name} is {_text(rows)}, expected float32 or bfloat16 {list(shape)} on a CPU, elements of a "
            "head adjacent"
        )


def _check_slots(slots: Tensor, count: int) -> None:
    if slots.dtype != torch.int64 or slots.shape != (count,) or not slots.is_contiguous():
        raise ValueError(f"slots are {_text(slots)}, expected contiguous int64 [{count}]")


def _text(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"


def _panel_words(head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes in words of the keys and of the values of one panel and head."""
    lanes = WORD // dtype.itemsize
    padded = -(-head_dim // PANEL) * PANEL
    return (head_dim // lanes, PANEL), (PANEL // lanes, padded)
