"""Device code on one tile of (query, key) pairs of whole sequences: from q and k to adapted scores.

Letters: G heads of a group, M rows, N keys of a tile, P = M N pairs, d head size, D hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dape_kernels.triton.attend import GROUP, pairs_first

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_heads(
    sequence,  # [N, H, d] of one sequence, elements of a head adjacent
    token_stride,
    head_stride,
    first_token,
    tokens,
    first_head,
    first_element,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Load [G, TOKENS, DIM] from a token, a head and an element of it on, zeros where there is nothing."""
    token, head = tl.arange(0, TOKENS), first_head + tl.arange(0, GROUP)
    element = first_element + tl.arange(0, DIM)
    place = token[None, :, None] * token_stride + head[:, None, None] * head_stride + element[None, None, :]
    there = (first_token + token < tokens)[None, :, None] & (head < HEADS)[:, None, None]
    there &= (element < SIZE)[None, None, :]
    base = sequence + tl.cast(first_token, tl.int64) * token_stride
    return tl.load(base + place, mask=there, other=0.0)


@triton.jit
def store_heads(
    sequence,  # [N, H, d], contiguous
    values,
    first_token,
    tokens,
    first_head,
    first_element,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Store [G, M, X] where `load_heads` would load it."""
    token, head = tl.arange(0, values.shape[1]), first_head + tl.arange(0, GROUP)
    element = first_element + tl.arange(0, values.shape[2])
    place = token[None, :, None] * (HEADS * SIZE) + head[:, None, None] * SIZE + element[None, None, :]
    there = (first_token + token < tokens)[None, :, None] & (head < HEADS)[:, None, None]
    there &= (element < SIZE)[None, None, :]
    base = sequence + tl.cast(first_token, tl.int64) * (HEADS * SIZE)
    tl.store(base + place, values.to(sequence.dtype.element_ty), mask=there)


@triton.jit
def row_numbers(first_row, tokens, group, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Return where the numbers [G, M] of rows lie in float32 [N, GROUPS * G], and which rows there are."""
    row, head = first_row + tl.arange(0, ROWS), group * GROUP + tl.arange(0, GROUP)
    return row[None, :] * (GROUPS * GROUP) + head[:, None], (row < tokens)[None, :]


@triton.jit
def heads_first(pairs, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Turn [P, G] into [G, M, N]."""
    return tl.permute(tl.reshape(pairs, (ROWS, KEYS, GROUP)), (2, 0, 1))


@triton.jit
def see(first_row, first_key, tokens, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Return which pairs [M, N] a row sees, and the distances [P], of others any that tables hold."""
    row, column = first_row + tl.arange(0, ROWS), first_key + tl.arange(0, KEYS)
    visible = (column[None, :] <= row[:, None]) & (row < tokens)[:, None]
    pair = tl.arange(0, ROWS * KEYS)
    distance = first_row + pair // KEYS - first_key - pair % KEYS
    return visible, tl.minimum(tl.maximum(distance, 0), tokens - 1)


@triton.jit
def multiply(left, right, PRECISION: tl.constexpr):
    """Return the products [G, M, N] of rows [G, M, d] and keys [G, N, d]."""
    return tl.dot(left, tl.permute(right, (0, 2, 1)), input_precision=PRECISION)


@triton.jit
def multiply_parts(
    left,
    left_token,
    left_head,
    right,
    right_token,
    right_head,
    first_row,
    first_key,
    tokens,
    group,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the products [G, M, N] of rows and keys of sequences, loaded PART elements at a time."""
    head = group * GROUP
    found = tl.zeros((GROUP, ROWS, KEYS), tl.float32)
    for element in range(0, DIM, PART):
        rows = load_heads(
            left, left_token, left_head, first_row, tokens, head, element, HEADS, SIZE, PART, ROWS
        )
        keys = load_heads(
            right, right_token, right_head, first_key, tokens, head, element, HEADS, SIZE, PART, KEYS
        )
        found = tl.dot(rows, tl.permute(keys, (0, 2, 1)), found, input_precision=PRECISION)
    return found


@triton.jit
def load_weights(weights, group, WIDTH: tl.constexpr):
    """Load the weights [G, D] of a group in one of the network's layers."""
    head, unit = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    return tl.load(weights + (group * GROUP + head)[:, None] * WIDTH + unit[None, :])


@triton.jit
def hidden_values(
    scores,  # of the group
    query,
    query_token,
    query_head,
    key,
    key_token,
    key_head,
    first,
    hidden,
    first_row,
    first_key,
    distance,
    tokens,
    group,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the hidden values [P, D] before the activation."""
    unit = tl.arange(0, WIDTH)
    found = tl.load(hidden + distance[:, None] * WIDTH + unit[None, :]).to(tl.float32)
    weights = load_weights(first, group, WIDTH)
    found = tl.dot(pairs_first(scores).to(weights.dtype), weights, found, input_precision=PRECISION)
    for other in range(1, GROUPS):
        near = (group + other) % GROUPS
        near_scores = multiply_parts(
            query,
            query_token,
            query_head,
            key,
            key_token,
            key_head,
            first_row,
            first_key,
            tokens,
            near,
            HEADS,
            SIZE,
            DIM,
            PART,
            PRECISION,
            ROWS,
            KEYS,
        )
        weights = load_weights(first, near, WIDTH)
        channels = pairs_first(near_scores * scale).to(weights.dtype)
        found = tl.dot(channels, weights, found, input_precision=PRECISION)
    return found


@triton.jit
def adapted_scores(
    scores,
    activated,  # [P, D], of the products' dtype
    second,
    residual,
    distance,
    group,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEPS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the adapted scores [G, M, N] of a group, given its scores."""
    head = group * GROUP + tl.arange(0, GROUP)
    change = tl.load(residual + distance[:, None] * (GROUPS * GROUP) + head[None, :])
    if WIDTH > 0:
        weights = tl.trans(load_weights(second, group, WIDTH))
        change = tl.dot(activated, weights, change, input_precision=PRECISION)
    change = heads_first(change, ROWS, KEYS)
    return scores + change if KEEPS_SCORES else change
