"""Writing new keys and values to the cache, rounded to its numbers, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dape_kernels.triton.cache import TokenCache
from dape_kernels.triton.encoding import padded

LINES = 64


@triton.jit(do_not_specialize=["plane", "lines"])
def write_kernel(
    key,  # [T, H, d], elements of a head adjacent
    key_row_stride,
    key_head_stride,
    value,
    value_row_stride,
    value_head_stride,
    slots,  # int64 [T]
    cached_key,  # [slots, H, d]
    cached_value,
    scales,  # float32 [2, slots, H]; int8 only
    plane,  # slots * H
    lines,  # T * H
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    LINES: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Store some heads of some rows: grid [T * H / LINES, 2], keys and values."""
    which = tl.program_id(1)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    dim = tl.arange(0, DIM)
    row, head = line // HEADS, line % HEADS
    held = line < lines
    there = held[:, None] & (dim < SIZE)[None, :]
    if which == 0:
        source = row * key_row_stride + head * key_head_stride
        new = tl.load(key + source[:, None] + dim[None, :], mask=there, other=0.0)
    else:
        source = row * value_row_stride + head * value_head_stride
        new = tl.load(value + source[:, None] + dim[None, :], mask=there, other=0.0)
    target = tl.load(slots + row, mask=held, other=0) * HEADS + head
    if QUANTISED:
        wide = new.to(tl.float32)
        scale = tl.max(tl.abs(wide), 1) / 127.0
        tl.store(scales + which * plane + target, scale, mask=held)
        # Nothing but zeros, or NaN, which the scale then says.
        usable = (scale > 0)[:, None]
        new = tl.where(usable, tl.floor(wide / tl.where(usable, scale[:, None], 1.0) + 0.5), 0.0)
    place = target[:, None] * SIZE + dim[None, :]
    if which == 0:
        tl.store(cached_key + place, new.to(cached_key.dtype.element_ty), mask=there)
    else:
        tl.store(cached_value + place, new.to(cached_value.dtype.element_ty), mask=there)


def write(cache: TokenCache, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Store keys and values [T, H, d] of new tokens in their slots, int64 [T].

    Raises:
        ValueError: a shape or stride that the kernel cannot read in place.
    """
    for name, rows in (("key", key), ("value", value)):
        if rows.shape != (len(slots), *cache.key.shape[1:]) or rows.stride(-1) != 1:
            raise ValueError(
                f"{name} is {list(rows.shape)} with strides {list(rows.stride())}, expected "
                f"{[len(slots), *cache.key.shape[1:]]} with the elements of a head adjacent"
            )
    if not len(slots):
        return
    heads, size = cache.key.shape[1:]
    lines = len(slots) * heads
    write_kernel[(-(-lines // LINES), 2)](
        key,
        *key.stride()[:2],
        value,
        *value.stride()[:2],
        slots,
        cache.key,
        cache.value,
        cache.scales if cache.scales is not None else torch.empty(0, device=key.device),
        len(cache.key) * heads,
        lines,
        HEADS=heads,
        SIZE=size,
        DIM=padded(size),
        LINES=LINES,
        QUANTISED=cache.scales is not None,
        num_warps=4,
    )
