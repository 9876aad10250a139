"""Device code on one tile of (query, key) pairs of whole sequences: from q and k to adapted scores.

Letters: G heads of a group, M rows, N keys of a tile, P = M N pairs, d head size, D hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dape_kernels.triton.attend import GROUP, pairs_first
from dape_kernels.triton.scores import LEAKY_SLOPE

LOG2_E = tl.constexpr(1.4426950408889634)


class Shape(NamedTuple):
    """What is compiled into the kernels: the layer's sizes and those of its tiles."""

    HEADS: int
    SIZE: int
    """d."""
    DIM: int
    """d, rounded up to a power of two."""
    PART: int
    """Elements of a head that a program holds at a time, where it does not need them all."""
    GROUPS: int
    WIDTH: int
    """D, rounded up; 0 without a network."""
    KEEPS_SCORES: bool
    """Whether scores are added to what the network makes of them."""
    PRECISION: str
    """Of products of float32 numbers."""
    ROWS: int
    """M."""
    KEYS: int
    """N."""


class Heads(NamedTuple):
    """A tensor [B, N, H, d], elements of a head adjacent; `of_sequence` moves its start."""

    start: Any
    sequence: Any
    """A stride, in elements, as the next two."""
    token: Any
    head: Any


class Network(NamedTuple):
    """The layer's weights and tables."""

    first: Any
    """[GROUPS, G, D]."""
    hidden: Any
    """[N, D], by distance, rounded as the weights."""
    second: Any
    """[GROUPS, G, D]."""
    residual: Any
    """float32 [N, GROUPS * G], by distance."""


class Tile(NamedTuple):
    """Where a tile of pairs lies in its sequence."""

    first_row: Any
    first_key: Any
    tokens: Any
    """N of the sequence."""


@triton.jit
def of_sequence(heads, sequence):
    """Return the part of one sequence."""
    return Heads(heads.start + sequence * heads.sequence, heads.sequence, heads.token, heads.head)


@triton.jit
def contiguous(start, sequence, tokens, SHAPE: tl.constexpr):
    """Return one sequence of a tensor [B, N, H, d] without gaps."""
    token: tl.constexpr = SHAPE.HEADS * SHAPE.SIZE
    return Heads(start + sequence * tokens * token, tokens * token, token, SHAPE.SIZE)


@triton.jit
def _places(
    heads,
    first_token,
    tokens,
    first_head,
    first_element,
    SHAPE: tl.constexpr,
    TOKENS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Return where [G, TOKENS, ELEMENTS] lie in a sequence, and which of them there are."""
    token, head = tl.arange(0, TOKENS), first_head + tl.arange(0, GROUP)
    element = first_element + tl.arange(0, ELEMENTS)
    place = token[None, :, None] * heads.token + head[:, None, None] * heads.head + element[None, None, :]
    there = (first_token + token < tokens)[None, :, None] & (head < SHAPE.HEADS)[:, None, None]
    there &= (element < SHAPE.SIZE)[None, None, :]
    return heads.start + tl.cast(first_token, tl.int64) * heads.token + place, there


@triton.jit
def load_heads(
    heads,
    first_token,
    tokens,
    first_head,
    first_element,
    SHAPE: tl.constexpr,
    TOKENS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Load [G, TOKENS, ELEMENTS] of a sequence from a token, a head and an element of it on, else zeros."""
    place, there = _places(heads, first_token, tokens, first_head, first_element, SHAPE, TOKENS, ELEMENTS)
    return tl.load(place, mask=there, other=0.0)


@triton.jit
def store_heads(heads, values, first_token, tokens, first_head, first_element, SHAPE: tl.constexpr):
    """Store [G, M, X] where `load_heads` would load it."""
    place, there = _places(
        heads, first_token, tokens, first_head, first_element, SHAPE, values.shape[1], values.shape[2]
    )
    tl.store(place, values.to(heads.start.dtype.element_ty), mask=there)


@triton.jit
def row_numbers(first_row, tokens, group, SHAPE: tl.constexpr):
    """Return where the numbers [G, M] of rows lie in float32 [N, GROUPS * G], and which rows there are."""
    row, head = first_row + tl.arange(0, SHAPE.ROWS), group * GROUP + tl.arange(0, GROUP)
    return row[None, :] * (SHAPE.GROUPS * GROUP) + head[:, None], (row < tokens)[None, :]


@triton.jit
def heads_first(pairs, SHAPE: tl.constexpr):
    """Turn [P, G] into [G, M, N]."""
    ROWS: tl.constexpr = SHAPE.ROWS
    KEYS: tl.constexpr = SHAPE.KEYS
    return tl.permute(tl.reshape(pairs, (ROWS, KEYS, GROUP)), (2, 0, 1))


@triton.jit
def see(tile, SHAPE: tl.constexpr):
    """Return which pairs [M, N] a row sees, and the distances [P], of others any that tables hold."""
    row, column = tile.first_row + tl.arange(0, SHAPE.ROWS), tile.first_key + tl.arange(0, SHAPE.KEYS)
    visible = (column[None, :] <= row[:, None]) & (row < tile.tokens)[:, None]
    pair = tl.arange(0, SHAPE.ROWS * SHAPE.KEYS)
    distance = tile.first_row + pair // SHAPE.KEYS - tile.first_key - pair % SHAPE.KEYS
    return visible, tl.minimum(tl.maximum(distance, 0), tile.tokens - 1)


@triton.jit
def multiply(left, right, PRECISION: tl.constexpr):
    """Return the products [G, M, N] of rows [G, M, d] and keys [G, N, d]."""
    return tl.dot(left, tl.permute(right, (0, 2, 1)), input_precision=PRECISION)


@triton.jit
def multiply_parts(left, right, tile, group, SHAPE: tl.constexpr):
    """Return the products [G, M, N] of rows and keys of sequences, loaded PART elements at a time."""
    ROWS: tl.constexpr = SHAPE.ROWS
    KEYS: tl.constexpr = SHAPE.KEYS
    head = group * GROUP
    found = tl.zeros((GROUP, ROWS, KEYS), tl.float32)
    for element in range(0, SHAPE.DIM, SHAPE.PART):
        rows = load_heads(left, tile.first_row, tile.tokens, head, element, SHAPE, ROWS, SHAPE.PART)
        keys = load_heads(right, tile.first_key, tile.tokens, head, element, SHAPE, KEYS, SHAPE.PART)
        found = tl.dot(rows, tl.permute(keys, (0, 2, 1)), found, input_precision=SHAPE.PRECISION)
    return found


@triton.jit
def load_weights(weights, group, WIDTH: tl.constexpr):
    """Load the weights [G, D] of a group in one of the network's layers."""
    head, unit = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    return tl.load(weights + (group * GROUP + head)[:, None] * WIDTH + unit[None, :])


@triton.jit
def activate(scores, query, key, network, tile, distance, group, scale, SHAPE: tl.constexpr):
    """Return the activated hidden values [P, D] in the dtype of products, given the scores of a group."""
    unit = tl.arange(0, SHAPE.WIDTH)
    found = tl.load(network.hidden + distance[:, None] * SHAPE.WIDTH + unit[None, :]).to(tl.float32)
    weights = load_weights(network.first, group, SHAPE.WIDTH)
    found = tl.dot(pairs_first(scores).to(weights.dtype), weights, found, input_precision=SHAPE.PRECISION)
    for other in range(1, SHAPE.GROUPS):
        near = (group + other) % SHAPE.GROUPS
        near_scores = multiply_parts(query, key, tile, near, SHAPE) * scale
        weights = load_weights(network.first, near, SHAPE.WIDTH)
        channels = pairs_first(near_scores).to(weights.dtype)
        found = tl.dot(channels, weights, found, input_precision=SHAPE.PRECISION)
    return tl.maximum(found, found * LEAKY_SLOPE).to(weights.dtype)


@triton.jit
def adapted_scores(scores, activated, network, distance, group, SHAPE: tl.constexpr):
    """Return the adapted scores [G, M, N] of a group, given its scores and activated hidden values [P, D]."""
    head = group * GROUP + tl.arange(0, GROUP)
    change = tl.load(network.residual + distance[:, None] * (SHAPE.GROUPS * GROUP) + head[None, :])
    if SHAPE.WIDTH > 0:
        weights = tl.trans(load_weights(network.second, group, SHAPE.WIDTH))
        change = tl.dot(activated, weights, change, input_precision=SHAPE.PRECISION)
    change = heads_first(change, SHAPE)
    return scores + change if SHAPE.KEEPS_SCORES else change
